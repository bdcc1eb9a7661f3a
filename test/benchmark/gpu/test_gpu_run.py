"""What run.sh leaves behind, with a stand-in for Python that starts a server of its own."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tarfile
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

RUN = Path(__file__).parents[3] / "benchmark" / "gpu" / "run.sh"
STAND_IN = """#!{python}
import json, os, pathlib, subprocess, sys, time
name, output, scratch = sys.argv[3], *map(pathlib.Path, (sys.argv[-3], sys.argv[-1]))
(scratch / "logs" / name).mkdir(parents=True)
(scratch / "models").mkdir(exist_ok=True)
(scratch / "models" / "large").write_text("weights")
log = (scratch / "logs" / name / "ours.log").open("w")
child = subprocess.Popen(["sleep", "600"], stdout=log, start_new_session=True)
log.write("loads are made by a kernel")
log.flush()
(output / f"{{name}}.json").write_text(json.dumps({{"server": child.pid, "arguments": sys.argv[4:-4]}}))
print("printed by", name, flush=True)
if name == "hangs":
    time.sleep(600)
sys.exit(3 if name == "fails" else 0)
"""


@pytest.fixture
def start(tmp_path: Path) -> Callable[..., subprocess.Popen[str]]:
    python = tmp_path / "python"
    python.write_text(STAND_IN.format(python=sys.executable))
    python.chmod(0o700)
    bundle, scratch = tmp_path / "bundle", tmp_path / "scratch"
    (bundle / "bundle" / "site").mkdir(parents=True)
    (bundle / "complete").touch()
    scratch.mkdir()
    variables = {"PYTHON": str(python), "BUNDLE": str(bundle), "SCRATCH": str(scratch), "GRACE": "2"}

    def run(*experiments: str) -> subprocess.Popen[str]:
        command = [str(RUN), "-", str(tmp_path / "out"), *experiments]
        return subprocess.Popen(command, env={**os.environ, **variables}, stdout=subprocess.PIPE, text=True)

    return run


def check_what_is_left(tmp_path: Path, names: set[str]) -> None:
    """Results and logs, flat; no model, and no server."""
    out = tmp_path / "out"
    results = {path.stem: json.loads(path.read_text()) for path in out.glob("*.json")}
    assert results.keys() == names
    assert {path.name for path in out.iterdir()} == {"logs.tgz", *(f"{name}.json" for name in names)}
    with tarfile.open(out / "logs.tgz") as logs:
        assert set(logs.getnames()) == {"./printed.log", *(f"./logs/{name}/ours.log" for name in names)}
        printed = logs.extractfile("./printed.log")
        assert printed is not None
        assert printed.read().decode().count("printed by") == len(names)
    assert not list((tmp_path / "scratch").iterdir())
    for result in results.values():
        assert not is_alive(result["server"])


def is_alive(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def test_each_experiment_has_its_limit_and_the_next_runs_whatever_became_of_it(
    start: Callable[..., subprocess.Popen[str]], tmp_path: Path
) -> None:
    running = start("1 hangs", "fails --shape tiny", "60 works")
    printed, _ = running.communicate(timeout=60)
    assert running.returncode == 124
    assert "ended after 1 s: hangs" in printed
    check_what_is_left(tmp_path, {"hangs", "fails", "works"})
    assert json.loads((tmp_path / "out" / "fails.json").read_text())["arguments"] == ["--shape", "tiny"]


def test_what_is_there_when_all_is_stopped_is_left(
    start: Callable[..., subprocess.Popen[str]], tmp_path: Path
) -> None:
    running = start("works", "hangs", "works")
    deadline = time.monotonic() + 30
    while not (tmp_path / "out" / "hangs.json").exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    time.sleep(0.3)
    bystander = subprocess.Popen(["sleep", "600"], start_new_session=True)
    running.send_signal(signal.SIGTERM)
    running.communicate(timeout=30)
    assert running.returncode == 143
    check_what_is_left(tmp_path, {"works", "hangs"})
    assert bystander.poll() is None
    bystander.kill()
    bystander.wait()
