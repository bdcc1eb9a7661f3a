"""`cached-attention top` against real HTTP servers that tell what a server may tell."""

from __future__ import annotations

import fcntl
import os
import pty
import select
import signal
import struct
import subprocess
import sys
import termios
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.client import HTTPResponse, IncompleteRead
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from typer.testing import CliRunner

from cached_attention.cli import app
from cached_attention.cli.scrape import Server
from cached_attention.metrics import PREFIX

METRICS = f"""
# TYPE sglang:num_queue_reqs gauge
sglang:num_queue_reqs{{model_name="m"}} 3.0
# TYPE {PREFIX}prompt_tokens counter
{PREFIX}prompt_tokens_total{{model_name="m"}} 1000.0
# TYPE {PREFIX}hit_tokens counter
{PREFIX}hit_tokens_total{{model_name="m",tier="device"}} 100.0
{PREFIX}hit_tokens_total{{model_name="m",tier="host"}} 600.0
# TYPE {PREFIX}resident_bytes gauge
{PREFIX}resident_bytes{{model_name="m",tier="host"}} 2000000.0
{PREFIX}resident_bytes{{model_name="m",tier="disk"}} 0.0
# TYPE {PREFIX}capacity_bytes gauge
{PREFIX}capacity_bytes{{model_name="m",tier="host"}} 4000000.0
{PREFIX}capacity_bytes{{model_name="m",tier="disk"}} 0.0
# TYPE {PREFIX}tier_healthy gauge
{PREFIX}tier_healthy{{model_name="m",tier="disk"}} 0.0
{PREFIX}tier_healthy{{model_name="m",tier="remote"}} 1.0
# TYPE {PREFIX}tier_errors counter
{PREFIX}tier_errors_total{{model_name="m",tier="remote"}} 3.0
"""
INFO = """{"internal_states": [{"cached_attention": {"hottest": [
{"conversation": "00ff00ff00ff00ff", "turns": 7, "tokens": 640, "reused_tokens": 3200, "idle_s": 4.0,
 "tiers": ["host"]}]}}]}"""


@contextmanager
def serving(pages: dict[str, str], api_key: str | None = None, port: int = 0) -> Iterator[str]:
    class Pages(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            path = self.path.rstrip("/")
            body = pages.get(path)
            allowed = path == "/metrics" or not api_key or self.headers["Authorization"] == f"Bearer {api_key}"
            self.send_response(404 if body is None else 200 if allowed else 401)
            self.end_headers()
            if body is not None and allowed:
                self.wfile.write(body.encode())

        def log_message(self, *_: object) -> None: ...

    with ThreadingHTTPServer(("127.0.0.1", port), Pages) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


def top(url: str, *arguments: str) -> tuple[int, str]:
    result = CliRunner().invoke(app, ["top", url, "--once", *arguments], env={"COLUMNS": "200"})
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return result.exit_code, result.output


def test_a_frame_shows_tiers_hits_queue_and_conversations() -> None:
    with serving({"/metrics": METRICS, "/server_info": INFO}) as url:
        status, shown = top(url)
    rows = [line.split() for line in shown.splitlines()]
    assert status == 0
    assert ["host", "-", "60.0%", "600"] in rows
    assert ["computed", "-", "30.0%", "300"] in rows
    assert "2 MB of 4 MB" in shown
    assert "out of service" in shown
    assert ["remote", "-", "-", "-", "3", "0", "good"] in rows
    assert "00ff00ff00ff00ff" in shown


def test_a_server_may_be_named_by_host_and_port() -> None:
    assert Server("localhost:30000/").url == "http://localhost:30000"


def test_conversations_need_the_key_and_the_rest_does_not() -> None:
    with serving({"/metrics": METRICS, "/server_info": INFO}, api_key="secret") as url:
        status, shown = top(url)
        assert status == 0
        assert "60.0%" in shown
        assert "401: give the server's --api-key" in shown
        assert "00ff00ff00ff00ff" in top(url, "--api-key", "secret")[1]


@pytest.mark.parametrize(
    ("pages", "said"),
    [
        ({}, "start the server with --enable-metrics"),
        ({"/metrics": "sglang:num_queue_reqs 1\n"}, "none of CachedAttention"),
        ({"/metrics": "<html>\n"}, "not in Prometheus' format"),
    ],
)
def test_what_is_wrong_is_said_in_a_sentence(pages: dict[str, str], said: str) -> None:
    with serving(pages) as url:
        status, shown = top(url)
    assert status == 1
    assert said in shown


def test_a_server_that_is_not_there_is_said_to_be() -> None:
    with serving({}) as url:
        pass
    status, shown = top(url)
    assert status == 1
    assert "cannot be reached" in shown


@pytest.mark.parametrize("page", ["/metrics", "/server_info"])
def test_a_server_that_ends_in_the_middle_of_an_answer(monkeypatch: pytest.MonkeyPatch, page: str) -> None:
    def read(response: HTTPResponse) -> bytes:
        if response.url.endswith(page):
            raise IncompleteRead(b"sgl", 1_000)
        return METRICS.encode()

    monkeypatch.setattr(HTTPResponse, "read", read)
    with serving({"/metrics": METRICS, "/server_info": INFO}) as url:
        status, shown = top(url)
    assert "IncompleteRead" in shown
    assert status == (1 if page == "/metrics" else 0)


@pytest.mark.parametrize("url", ["127.0.0.1:abc", "http://a b:1"])
def test_what_is_no_url_is_said_in_a_sentence(url: str) -> None:
    status, shown = top(url)
    assert status == 1
    assert "cannot be reached" in shown


class Terminal:
    """A terminal in which `cached-attention top` runs."""

    def __init__(self, url: str, columns: int) -> None:
        self._master, inside = pty.openpty()
        self.resize(columns)
        # Where the tests run in the background, SIGINT is ignored, and so it would be in what they start.
        code = "import signal; signal.signal(signal.SIGINT, signal.default_int_handler); "
        code += "from cached_attention.cli import app; app()"
        command = [sys.executable, "-c", code, "top", url, "--interval", "0.2"]
        env = {**os.environ, "TERM": "xterm"}
        for name in ("COLUMNS", "LINES", "NO_COLOR"):
            env.pop(name, None)
        self.process = subprocess.Popen(command, stdin=inside, stdout=inside, stderr=inside, env=env)
        os.close(inside)

    def resize(self, columns: int) -> None:
        fcntl.ioctl(self._master, termios.TIOCSWINSZ, struct.pack("HHHH", 50, columns, 0, 0))

    def wait_for(self, *texts: str) -> str:
        """What was written since the last call, once all of `texts` are in it."""
        written, deadline = "", time.monotonic() + 60
        while not all(text in written for text in texts):
            assert time.monotonic() < deadline, f"{texts} never shown, but {written[-3_000:]}"
            if select.select([self._master], [], [], 0.1)[0]:
                written += os.read(self._master, 1 << 16).decode(errors="ignore")
        return written

    def __enter__(self) -> Terminal:
        return self

    def __exit__(self, *_: object) -> None:
        self.process.kill()
        self.process.wait()
        os.close(self._master)


def test_the_live_view_outlives_its_server_and_leaves_the_terminal_as_it_was() -> None:
    pages = {"/metrics": METRICS, "/server_info": INFO}
    alternate_screen, cursor = ("\x1b[?1049h", "\x1b[?1049l"), "\x1b[?25h"
    with serving(pages) as url:
        terminal = Terminal(url, columns=140)
        shown = terminal.wait_for("00ff00ff00ff00ff")
    with terminal:
        assert alternate_screen[0] in shown
        assert any("Prompt tokens from" in line and "Transfers" in line for line in shown.splitlines())
        terminal.wait_for("cannot be reached", "Trying again", "00ff00ff00ff00ff")
        terminal.resize(columns=80)
        pages["/server_info"] = INFO.replace("00ff", "11ee")
        with serving(pages, port=int(url.rpartition(":")[2])):
            _, _, shown = terminal.wait_for("11ee11ee11ee11ee").rpartition("CachedAttention  ")
            assert not any("Prompt tokens from" in line and "Transfers" in line for line in shown.splitlines())
            terminal.process.send_signal(signal.SIGINT)
            terminal.wait_for(alternate_screen[1], cursor)
            assert terminal.process.wait(60) == 0
