"""A real Mooncake store, with its master and a memory lender, for tests and benchmarks of the remote tier."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import tempfile
import time
from abc import ABC, abstractmethod
from pathlib import Path
from types import TracebackType
from typing import Self
from urllib.request import urlopen

from benchmark.server import free_port
from cached_attention.tiers.remote_client import RemoteError, load_mooncake

START_SECONDS = 60.0
MESSAGE_BYTES = 2000
"""Bytes reported of the output of a master that did not start."""
LENDER = """
import sys
from cached_attention.tiers.remote_address import parse_remote
from cached_attention.tiers.remote_client import RemoteClient
address = parse_remote("--remote", sys.argv[1])
client = RemoteClient(address, address.segment)
client.connect([])
print("ready", flush=True)
sys.stdin.read()
"""


def missing() -> str | None:
    """Why master and client cannot run on this machine; None if they can."""
    try:
        load_mooncake()
    except RemoteError as error:
        return str(error)
    return None


class _Process(ABC):
    """A process of the store that runs for as long as the context is open."""

    _process: subprocess.Popen[bytes] | None = None

    @abstractmethod
    def start(self) -> None: ...

    @property
    def runs(self) -> bool:
        return self._process is not None and self._process.poll() is None

    def kill(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.communicate()
            self._process = None

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.kill()


class Master(_Process):
    """A master on a free port of this machine, which forgets all objects when it ends.

    Args:
        log: file to which its output is appended; None: not kept.
        client_ttl: seconds after which a lost server is noticed.
    """

    def __init__(self, log: Path | None = None, client_ttl: int = 10) -> None:
        self.port, self._metrics_port = free_port(), free_port()
        self._log = log
        self._client_ttl = client_ttl

    def url(self, segment: str) -> str:
        """URL for `--cached-attention-remote`."""
        return f"mooncake://127.0.0.1:{self.port}?segment={segment}"

    def start(self) -> None:
        """Start; returns when it accepts connections.

        Raises:
            RuntimeError: it does not start; the message ends with its output.
        """
        # Each master serves metrics on a port of its own.
        flags = {"rpc_port": self.port, "rpc_address": "127.0.0.1", "metrics_port": self._metrics_port}
        flags |= {"client_ttl": self._client_ttl, "logtostderr": "true"}
        command = [str(Path(sys.executable).with_name("mooncake_master"))]
        with self._log.open("a+b") if self._log else tempfile.TemporaryFile() as log:
            self._process = subprocess.Popen(
                [*command, *(f"--{name}={value}" for name, value in flags.items())], stdout=log, stderr=log
            )
            if not self._takes_connections():
                self.kill()
                said = os.pread(log.fileno(), os.fstat(log.fileno()).st_size, 0)[-MESSAGE_BYTES:]
                raise RuntimeError(f"mooncake_master did not start:\n{said.decode(errors='replace')}")

    def _takes_connections(self) -> bool:
        deadline = time.monotonic() + START_SECONDS
        while self.runs and time.monotonic() < deadline:
            try:
                socket.create_connection(("127.0.0.1", self.port), 1).close()
            except OSError:
                time.sleep(0.05)
            else:
                return True
        return False

    @property
    def objects(self) -> int:
        """Number of objects in the store."""
        with urlopen(f"http://127.0.0.1:{self._metrics_port}/metrics", timeout=10) as response:
            lines = response.read().decode().splitlines()
        return next(int(line.split()[1]) for line in lines if line.startswith("master_key_count "))

    @property
    def pid(self) -> int:
        assert self._process is not None, "the master does not run"
        return self._process.pid


class Lender(_Process):
    """A process that lends `size`, such as 128MB, to the store; it reconnects after the master was away."""

    def __init__(self, master: Master, size: str) -> None:
        self._url = master.url(size)

    def start(self) -> None:
        """Start; returns when the memory is lent.

        Raises:
            RuntimeError: it could not be lent.
        """
        command = [sys.executable, "-c", LENDER, self._url]
        pipe, nothing = subprocess.PIPE, subprocess.DEVNULL
        self._process = subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=nothing)
        assert self._process.stdout is not None
        if not self._process.stdout.readline():
            raise RuntimeError(f"no memory could be lent to {self._url}")
