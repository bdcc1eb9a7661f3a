"""Servers that start in seconds: forked from a process that has already imported SGLang.

Nearly all of the time to start a small server on a CPU is the import of SGLang, in three processes. These servers
run the same program with the same arguments; if the start itself is what matters, use `Server`.
"""

from __future__ import annotations

import multiprocessing
import os
import runpy
import sys
import tempfile
from collections.abc import Mapping, Sequence
from functools import cache
from multiprocessing.context import ForkServerProcess
from unittest.mock import patch

from benchmark.server import PROGRAM, Server

MODULES = [
    PROGRAM,
    "sglang.srt.entrypoints.http_server",
    "sglang.srt.managers.scheduler",
    "sglang.srt.managers.detokenizer_manager",
    "sglang.srt.models.registry",
    "benchmark.frozen",
]
METRICS_DIRECTORY = "PROMETHEUS_MULTIPROC_DIR"


@cache
def early_environment() -> dict[str, str]:
    """Environment that the launch of a server sets for libraries that its workers have yet to load."""
    return {"OMP_WAIT_POLICY": "PASSIVE", METRICS_DIRECTORY: tempfile.mkdtemp(prefix="sglang-metrics-")}


class PreloadedServer(Server):
    """A `Server` without the time that imports take; the first one in a process waits for them."""

    def _launch(self, environment: Mapping[str, str]) -> ForkedProcess:
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(MODULES)
        program = self.command.index(PROGRAM)
        early = early_environment()
        own = {METRICS_DIRECTORY: tempfile.mkdtemp(dir=early[METRICS_DIRECTORY]), **environment}
        process = context.Process(target=_serve, args=(self.command[program:], own, str(self.log)))
        with patch.dict(os.environ, early):
            process.start()
        return ForkedProcess(process)


class ForkedProcess:
    """A forked process with the interface that `Server` needs."""

    def __init__(self, process: ForkServerProcess) -> None:
        self._process = process
        assert process.pid is not None
        self.pid = process.pid

    def poll(self) -> int | None:
        return self._process.exitcode

    def send_signal(self, number: int) -> None:
        os.kill(self.pid, number)

    def wait(self) -> None:
        self._process.join()


def _serve(command: Sequence[str], environment: Mapping[str, str], log: str) -> None:
    os.setsid()
    descriptor = os.open(log, os.O_WRONLY | os.O_APPEND)
    for stream in (sys.stdout, sys.stderr):
        os.dup2(descriptor, stream.fileno())
    os.environ.clear()
    os.environ.update(environment)
    multiprocessing.set_start_method("fork", force=True)
    # SGLang asks for "spawn", which would import everything again.
    multiprocessing.set_start_method = lambda *_, **__: None
    sys.argv = list(command)
    runpy.run_module(PROGRAM, run_name="__main__", alter_sys=True)
