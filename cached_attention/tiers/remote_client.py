"""The part of Mooncake's client that the remote tier needs."""

from __future__ import annotations

import os
import socket
from collections.abc import Sequence
from importlib.util import find_spec
from typing import Any, NamedTuple

from cached_attention.config import ConfigError
from cached_attention.tiers.remote_address import RemoteAddress

CONNECT_SECONDS = 2.0
LOCAL_BUFFER = 16 << 20
"""Bytes of Mooncake's own staging buffer, unused by calls that take our addresses."""
NOT_FOUND = -704
"""Mooncake's OBJECT_NOT_FOUND."""
UNREACHABLE = frozenset({-1, -900})
"""Mooncake's codes when the master does not answer: not set up, RPC_FAIL."""
SETTINGS = {
    # Failures are counted and logged by us, at intervals; Mooncake would log a line per object.
    "GLOG_minloglevel": "3",
    "MC_LOG_LEVEL": "ERROR",
}


class RemoteError(Exception):
    """The remote store cannot be reached."""


class Extent(NamedTuple):
    """One object, and the parts of registered memory that hold it."""

    key: str
    addresses: tuple[int, ...]
    sizes: tuple[int, ...]


def check_installed(flag: str) -> None:
    """Check that Mooncake is installed; not that it loads, which needs the machine's libibverbs.

    Raises:
        ConfigError: it is not installed.
    """
    if find_spec("mooncake") is None:
        raise ConfigError(
            f"{flag} needs a package that is not installed: "
            "pip install 'mooncake-transfer-engine-non-cuda>=0.3.13'"
        )


def load_mooncake() -> type[Any]:
    """Load Mooncake's client class.

    Raises:
        RemoteError: it cannot be loaded.
    """
    for name, value in SETTINGS.items():
        os.environ.setdefault(name, value)
    try:
        from mooncake.store import MooncakeDistributedStore
    except ImportError as error:
        raise RemoteError(f"Mooncake does not load ({error}); on Debian: apt-get install libibverbs1") from error
    return MooncakeDistributedStore


class RemoteClient:
    """One connection to a Mooncake store. All calls block on the network; any thread may make them.

    If the master does not answer, a call takes up to about 5 s and raises RemoteError.

    Args:
        segment: bytes that this process lends.
    """

    def __init__(self, address: RemoteAddress, segment: int) -> None:
        self._address = address
        self._segment = segment
        self._store: Any = None

    @property
    def connected(self) -> bool:
        return self._store is not None

    def connect(self, memory: Sequence[tuple[int, int]]) -> None:
        """Join the store; `memory`: address and bytes of each region that objects move from or to."""
        own_host = self.ping()  # Mooncake's own attempts take a minute and a half.
        address, store = self._address, load_mooncake()()
        code = store.setup(
            address.own_host or own_host,
            address.metadata,
            self._segment,
            LOCAL_BUFFER,
            address.protocol,
            address.device,
            address.master,
        )
        if code != 0:
            store.close()
            raise RemoteError(f"Mooncake at {address.master} cannot be set up, error {code}")
        for start, size in memory:
            if (code := store.register_buffer(start, size)) != 0:
                store.close()
                raise RemoteError(f"Mooncake cannot register {size} bytes, error {code}")
        self._store = store

    def ping(self) -> str:
        """Check that the master accepts connections; returns the local address of the connection."""
        address = self._address
        try:
            with socket.create_connection((address.host, address.port), CONNECT_SECONDS) as connection:
                return connection.getsockname()[0]
        except OSError as error:
            raise RemoteError(f"no Mooncake master at {address.master}: {error}") from error

    def exist(self, keys: Sequence[str]) -> list[bool]:
        return [code == 1 for code in self._checked(self._call.batch_is_exist(list(keys)))]

    def get(self, extents: Sequence[Extent]) -> list[int]:
        """Fill the memory of each object; returns for each its bytes, or a negative code."""
        return self._checked(self._call.batch_get_into_multi_buffers(*_columns(extents)))

    def put(self, extents: Sequence[Extent]) -> list[bool]:
        """Whether each object is in the store now; one that was there before is left unchanged."""
        return [code == 0 for code in self._checked(self._call.batch_put_from_multi_buffers(*_columns(extents)))]

    def size(self, key: str) -> int:
        """Bytes of an object, or a negative code."""
        return self._checked([self._call.get_size(key)])[0]

    def remove(self, keys: Sequence[str]) -> None:
        """Remove objects, even those being read: their readers verify what they got."""
        self._checked(self._call.batch_remove(list(keys), True))

    def close(self) -> None:
        """Take back the lent memory; what it held is lost to all servers."""
        if (store := self._store) is not None:
            self._store = None
            store.close()

    @property
    def _call(self) -> Any:
        if self._store is None:
            raise RemoteError("not connected")
        return self._store

    def _checked(self, codes: list[int]) -> list[int]:
        if codes and all(code in UNREACHABLE for code in codes):
            raise RemoteError(f"the Mooncake master at {self._address.master} does not answer, error {codes[0]}")
        return codes


def _columns(extents: Sequence[Extent]) -> tuple[list[str], list[list[int]], list[list[int]]]:
    keys = [extent.key for extent in extents]
    return keys, [list(extent.addresses) for extent in extents], [list(extent.sizes) for extent in extents]
