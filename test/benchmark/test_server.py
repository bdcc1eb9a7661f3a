"""The server class around stand-ins for SGLang: a module of the same name earlier on the path."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from benchmark.configuration import Configuration
from benchmark.fleet import Fleet
from benchmark.server import Server, ServerError

ECHO = """
import json, signal, subprocess, sys, threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

METRICS = '''# TYPE tokens counter
tokens_total{tier="host",rank="0"} 3.0
tokens_total{tier="device",rank="0"} 4.0
# TYPE usage gauge
usage 0.5
'''

class Handler(BaseHTTPRequestHandler):
    def do_GET(self):
        self.answer(METRICS if self.path.startswith("/metrics") else "ok")
    def do_POST(self):
        body = self.rfile.read(int(self.headers["Content-Length"])).decode()
        self.answer(body, 400 if "refuse" in body else 200)
    def answer(self, text, status=200):
        self.send_response(status)
        self.end_headers()
        self.wfile.write(text.encode())

# A child that left the process group and ignores SIGTERM, as a stubborn worker would.
child = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); time.sleep(600)"
subprocess.Popen([sys.executable, "-c", child], start_new_session=True)
port = int(sys.argv[sys.argv.index("--port") + 1])
ThreadingHTTPServer(("127.0.0.1", port), Handler).serve_forever()
"""


@pytest.fixture
def stand_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], Path]:
    """Make `python -m sglang.launch_server` run the given source; returns a model directory."""

    def make(source: str) -> Path:
        package = tmp_path / "path" / "sglang"
        package.mkdir(parents=True)
        (package / "__init__.py").touch()
        (package / "launch_server.py").write_text(source)
        monkeypatch.setenv("PYTHONPATH", str(package.parent))
        model = tmp_path / "model"
        model.mkdir()
        (model / "config.json").write_text(json.dumps({"dtype": "float32"}))
        return model

    return make


@pytest.fixture
def quick_stop(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("benchmark.server.TERMINATION_GRACE_S", 0.5)


@pytest.mark.usefixtures("quick_stop")
def test_requests_and_metrics(stand_in: Callable[[str], Path], tmp_path: Path) -> None:
    with Server(stand_in(ECHO), log=tmp_path / "logs" / "server.log") as server:
        sent = server.generate([1, 2], 5, rid="r", sampling_params={"top_k": 1})
        assert sent["input_ids"] == [1, 2]
        assert sent["rid"] == "r"
        greedy = {"temperature": 0, "max_new_tokens": 5, "ignore_eos": True}
        assert sent["sampling_params"] == {**greedy, "top_k": 1}
        assert server.generate("text")["text"] == "text"
        assert server.generate(["a", "b"])["text"] == ["a", "b"]
        with pytest.raises(ServerError, match="/generate answered 400"):
            server.generate("refuse")
        metrics = server.metrics()
        assert metrics["tokens_total"] == 7.0
        assert metrics['tokens_total{rank="0",tier="host"}'] == 3.0
        assert metrics["usage"] == 0.5
        assert server.metric("tokens_total", tier="device") == 4.0
        assert server.metric("tokens_total", tier="disk") == 0.0


@pytest.mark.usefixtures("quick_stop")
@pytest.mark.parametrize("way", ["stop", "kill"])
def test_nothing_is_left_behind(stand_in: Callable[[str], Path], way: str) -> None:
    with Server(stand_in(ECHO)) as server:
        family = psutil.Process(server.process.pid).children(recursive=True)
        assert family
        getattr(server, way)()
        assert not any(one.is_running() and one.status() != psutil.STATUS_ZOMBIE for one in family)
        assert server.process.returncode is not None


@pytest.mark.usefixtures("quick_stop")
def test_a_fleet_is_stopped_at_once(stand_in: Callable[[str], Path], tmp_path: Path) -> None:
    """Three servers that ignore SIGTERM take as long as one, and nothing of them is left."""
    model = stand_in("import signal; signal.signal(signal.SIGTERM, signal.SIG_IGN)" + ECHO)
    chosen = [Configuration(name, ()) for name in "abc"]
    with Fleet(model, chosen, tmp_path / "logs") as fleet:
        families = [one for server in fleet._servers for one in psutil.Process(server.process.pid).children()]
        fleet.flush()
        assert {"a", "b", "c"} == {log.stem for log in map(fleet.log, fleet.urls) if log.exists()}
        ending = time.monotonic()
    assert time.monotonic() - ending < 1.2
    assert len(families) == 3
    assert not any(one.is_running() and one.status() != psutil.STATUS_ZOMBIE for one in families)


def test_a_server_that_dies_is_reported_at_once(stand_in: Callable[[str], Path]) -> None:
    model = stand_in("print('out of luck'); raise SystemExit(3)")
    started = time.monotonic()
    with pytest.raises(ServerError, match=r"(?s)status 3.*out of luck"), Server(model):
        pass
    assert time.monotonic() - started < 10


def test_a_server_that_never_answers_is_stopped(stand_in: Callable[[str], Path]) -> None:
    model = stand_in("import time; print('thinking', flush=True); time.sleep(600)")
    server = Server(model, timeout_s=0.5)
    with pytest.raises(ServerError, match=r"(?s)not ready.*thinking"), server:
        pass
    assert server.process.returncode is not None


def test_arguments_environment_and_dtype(stand_in: Callable[[str], Path]) -> None:
    model = stand_in("import os, sys; print(sys.argv[1:], os.environ['EXTRA'], os.environ['HOME']); sys.exit(1)")
    with pytest.raises(ServerError) as failure, Server(model, ["--flag", "1"], env={"EXTRA": "yes"}):
        pass
    assert f"'--dtype', 'float32', '--flag', '1'] yes {os.environ['HOME']}" in str(failure.value)


def test_own_dtype_argument_wins(stand_in: Callable[[str], Path]) -> None:
    model = stand_in("raise SystemExit(1)")
    server = Server(model, ["--dtype", "bfloat16"])
    server.stop()
    assert server.command.count("--dtype") == 1
