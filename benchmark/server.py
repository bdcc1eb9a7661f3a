"""A real SGLang server as a context manager, for benchmarks, examples and tests."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO, Protocol, Self

import psutil
from prometheus_client.parser import text_string_to_metric_families

PROGRAM = "sglang.launch_server"
TAIL_BYTES = 6_000
TERMINATION_GRACE_S = 15.0
# A proxy in the environment must not see requests to this machine.
DIRECT = urllib.request.build_opener(urllib.request.ProxyHandler({}))


class ServerError(RuntimeError):
    """The server did not start, died, or refused a request."""


def free_port() -> int:
    """A port that nothing listens on at the moment of the call."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


class Process(Protocol):
    """The part of `subprocess.Popen` that `Server` uses."""

    pid: int

    def poll(self) -> int | None: ...

    def send_signal(self, number: int, /) -> None: ...

    def wait(self) -> Any: ...


class Server:
    """SGLang serving `model` on a free port, in a process group of its own.

    `args` are appended to the command line unchanged; a float32 model is served in float32 unless they contain
    --dtype. `env` is added to the current environment. `log` receives stdout and stderr (default: a new temporary
    file). The constructor starts the process; entering the context, or `wait_ready()`, waits until it answers.
    Requests may come from many threads.
    """

    def __init__(
        self,
        model: Path,
        args: Sequence[str] = (),
        env: Mapping[str, str] | None = None,
        log: Path | None = None,
        timeout_s: float = 300,
    ) -> None:
        self.model = Path(model)
        self.timeout_s = timeout_s
        self.log = Path(log) if log is not None else _temporary_log()
        self.log.parent.mkdir(parents=True, exist_ok=True)
        port = free_port()
        self.url = f"http://127.0.0.1:{port}"
        launch = [sys.executable, "-m", PROGRAM, "--model-path", str(self.model)]
        where = ["--host", "127.0.0.1", "--port", str(port)]
        self.command = [*launch, *where, *_own_dtype(self.model, args), *args]
        self._log_file: BinaryIO = self.log.open("wb")
        self._started = time.monotonic()
        self._seen: set[psutil.Process] = set()
        self.process = self._launch({**os.environ, "PYTHONUNBUFFERED": "1", **(env or {})})

    def _launch(self, environment: Mapping[str, str]) -> Process:
        return subprocess.Popen(
            self.command,
            stdin=subprocess.DEVNULL,
            stdout=self._log_file,
            stderr=subprocess.STDOUT,
            env=environment,
            start_new_session=True,
        )

    def __enter__(self) -> Self:
        try:
            return self.wait_ready()
        except BaseException:
            self.stop()
            raise

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    @property
    def ready(self) -> bool:
        """Whether the server answers its health check now; raises ServerError if its process has ended."""
        if (status := self.process.poll()) is not None:
            raise ServerError(f"the server ended with status {status}.\n{self._diagnosis()}")
        self._seen.update(_descendants(self.process.pid))
        try:
            with DIRECT.open(f"{self.url}/health", timeout=20) as response:
                return bool(response.status == 200)
        except OSError:
            return False

    def wait_ready(self, on_wait: Callable[[], object] = lambda: None) -> Self:
        """Return when the server answers; ServerError if it dies or takes longer than `timeout_s`.

        `on_wait` is called a few times a second meanwhile.
        """
        while not self.ready:
            on_wait()
            waited = time.monotonic() - self._started
            if waited > self.timeout_s:
                raise ServerError(
                    f"the server was not ready after {waited:.0f} s; raise timeout_s if the model is large.\n"
                    f"{self._diagnosis()}"
                )
            time.sleep(0.25)
        return self

    def generate(
        self,
        prompt: str | Sequence[int] | Sequence[Sequence[int]] | Sequence[str],
        max_new_tokens: int = 16,
        *,
        sampling_params: Mapping[str, Any] | None = None,
        **request: Any,
    ) -> Any:
        """Response JSON of /generate: a dict with `text`, `output_ids`, `meta_info`; a list of them for a batch.

        Greedy and ignoring EOS unless `sampling_params` says otherwise. `request` holds any other fields of the
        request (`rid`, `extra_key`, `return_logprob`, ...). ServerError carries the server's refusal.
        """
        sampling = {"temperature": 0, "max_new_tokens": max_new_tokens, "ignore_eos": True}
        field = "text" if _is_text(prompt) else "input_ids"
        body = {field: prompt, "sampling_params": {**sampling, **(sampling_params or {})}, **request}
        return json.loads(self.post("/generate", body))

    def flush_cache(self, timeout_s: float = 30.0) -> None:
        """Forget every cached token; waits for running requests up to `timeout_s`."""
        self.post(f"/flush_cache?timeout={timeout_s}", None)

    def metrics(self) -> dict[str, float]:
        """Samples of /metrics (needs --enable-metrics).

        Every sample is stored under its full name, `name{label="value",...}` with labels sorted, and the sum over
        all label sets under the bare name.
        """
        totals: dict[str, float] = {}
        for name, labels, value in self._samples():
            if labels:
                pairs = ",".join(f'{key}="{labels[key]}"' for key in sorted(labels))
                totals[f"{name}{{{pairs}}}"] = value
            totals[name] = totals.get(name, 0.0) + value
        return totals

    def metric(self, metric_name: str, /, **labels: str) -> float:
        """Sum of the samples called `metric_name` that carry all of `labels`; 0.0 if there is none."""
        return sum(
            value
            for name, present, value in self._samples()
            if name == metric_name and labels.items() <= present.items()
        )

    def get(self, path: str, timeout_s: float = 60.0) -> str:
        """Body of a GET on `path`, which starts with a slash."""
        return self._exchange(urllib.request.Request(self.url + path), timeout_s)

    def post(self, path: str, body: Any, timeout_s: float = 600.0) -> str:
        """Body of the answer to a POST of `body` as JSON (None: empty); `path` starts with a slash."""
        return self.request("POST", path, body, timeout_s)

    def request(
        self,
        method: str,
        path: str,
        body: Any,
        timeout_s: float = 600.0,
        headers: Mapping[str, str] | None = None,
    ) -> str:
        """Like `post`, with another method or more headers."""
        data = b"" if body is None else json.dumps(body).encode()
        every = {"Content-Type": "application/json", **(headers or {})}
        request = urllib.request.Request(self.url + path, data=data, headers=every, method=method)
        return self._exchange(request, timeout_s)

    def log_tail(self, size: int = TAIL_BYTES) -> str:
        """The last `size` bytes of the log."""
        with self.log.open("rb") as stream:
            stream.seek(max(0, self.log.stat().st_size - size))
            return stream.read().decode(errors="replace")

    def stop(self) -> None:
        """Stop the server and everything it started; may be called again."""
        stop_all([self])

    def ask_to_end(self) -> list[psutil.Process]:
        """Send SIGTERM; returns the processes that were alive then."""
        family = self._family()
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
        return family

    def kill(self) -> None:
        """Stop the server like a crash: SIGKILL to all of its processes at once."""
        self._family()
        kill_all([self])

    def kill_family(self) -> list[psutil.Process]:
        """Send SIGKILL to all that is alive, and return it; for `kill_all`, which waits for it."""
        family = self._family()
        for process in family:
            _kill_quietly(process)
        return family

    def forget_process(self) -> None:
        """Call when nothing of the server is alive."""
        self.process.wait()
        self._log_file.close()

    def _family(self) -> list[psutil.Process]:
        """Live processes of the server: its group, and descendants that left the group."""
        self._seen.update(_descendants(self.process.pid))
        self._seen.update(_group(self.process.pid))
        return [process for process in self._seen if _is_alive(process)]

    def _samples(self) -> list[tuple[str, dict[str, str], float]]:
        families = text_string_to_metric_families(self.get("/metrics/"))
        return [(s.name, s.labels, s.value) for family in families for s in family.samples]

    def _exchange(self, request: urllib.request.Request, timeout_s: float) -> str:
        try:
            with DIRECT.open(request, timeout=timeout_s) as response:
                return str(response.read().decode())
        except urllib.error.HTTPError as refusal:
            detail = refusal.read().decode(errors="replace")
            raise ServerError(f"{request.selector} answered {refusal.code}: {detail}") from refusal
        except OSError as failure:
            raise ServerError(f"{request.selector}: {failure}.\n{self._diagnosis()}") from failure

    def _diagnosis(self) -> str:
        return f"command: {' '.join(self.command)}\nlog {self.log} ends with:\n{self.log_tail()}"


def stop_all(servers: Sequence[Server]) -> None:
    """Stop servers, and everything they started, at the same time: it takes as long as the slowest."""
    asked = [process for server in servers for process in server.ask_to_end()]
    psutil.wait_procs(asked, timeout=TERMINATION_GRACE_S)
    kill_all(servers)


def kill_all(servers: Sequence[Server]) -> None:
    """SIGKILL to everything that is left of the servers."""
    killed = [process for server in servers for process in server.kill_family()]
    psutil.wait_procs(killed, timeout=TERMINATION_GRACE_S)
    for server in servers:
        server.forget_process()


def _temporary_log() -> Path:
    handle, name = tempfile.mkstemp(prefix="sglang-server-", suffix=".log")
    os.close(handle)
    return Path(name)


def _own_dtype(model: Path, args: Sequence[str]) -> list[str]:
    """Keep a float32 model in float32: SGLang's default would serve it in float16, slowly on a CPU and with
    rounding that flips near-ties between tokens."""
    config = model / "config.json"
    if "--dtype" in args or not config.is_file():
        return []
    return ["--dtype", "float32"] if json.loads(config.read_text()).get("dtype") == "float32" else []


def _is_text(prompt: str | Sequence[Any]) -> bool:
    return isinstance(prompt, str) or (len(prompt) > 0 and isinstance(prompt[0], str))


def _descendants(pid: int) -> list[psutil.Process]:
    try:
        parent = psutil.Process(pid)
        return [parent, *parent.children(recursive=True)]
    except psutil.NoSuchProcess:
        return []


def _group(group: int) -> list[psutil.Process]:
    return [process for process in psutil.process_iter() if _group_of(process.pid) == group]


def _group_of(pid: int) -> int | None:
    try:
        return os.getpgid(pid)
    except ProcessLookupError:
        return None


def _is_alive(process: psutil.Process) -> bool:
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def _kill_quietly(process: psutil.Process) -> None:
    try:
        process.kill()
    except psutil.NoSuchProcess:
        return
