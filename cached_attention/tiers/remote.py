"""The remote tier: page records of one fingerprint in a Mooncake store that several servers share.

An object is a page record and, behind it, its checksum over key and bytes. Its key is that of the fingerprint
and of the page, so servers that may not share pages never meet. Records go from the arena to the wire and back
without a copy. Which objects there are is known to the store alone: it drops them when it is full, and with the
server whose memory they lie in.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from functools import partial

import numpy as np

from cached_attention.checksum import page_checksum
from cached_attention.fingerprint import Fingerprint
from cached_attention.tiers.disk_health import Health
from cached_attention.tiers.disk_pages import PageRead, PageWrite, ReadOutcome, Ticket
from cached_attention.tiers.disk_queue import IoQueue, Priority
from cached_attention.tiers.host import HostTier
from cached_attention.tiers.remote_address import RemoteAddress
from cached_attention.tiers.remote_client import NOT_FOUND, Extent, RemoteClient, RemoteError

logger = logging.getLogger(__name__)

CALL_PAGES = 16
"""Pages per call of the store at most, so that a request's first pages land before its last."""
PROBE_SECONDS = (1.0, 10.0)
TRAILER_BYTES = 8
CALL_ERRORS = (RemoteError, RuntimeError, TypeError, ValueError)
"""Ours, and those of Mooncake's binding."""


@dataclass
class RemoteStats:
    """Counts since the tier was made, in pages."""

    got: int = 0
    put: int = 0
    refused: int = 0
    """Not put: no memory free in the store, or out of service."""
    missed: int = 0
    """Asked for and not there any more, or the server that had them is gone."""
    damaged: int = 0
    """Short, foreign, or bytes other than were saved; removed."""


class RemoteTier:
    """Puts pages into the remote store and gets them back; see `PageSource`.

    No method waits for the network but `close`. Futures are completed on the tier's own threads. Until the
    store is reached, and whenever it cannot be, the tier is out of service: nothing is there, nothing is put.

    Args:
        segment: bytes of this process's memory that the store may use for anybody's pages.
        probe_seconds: between attempts to reach the store, at first and at most.
    """

    def __init__(
        self,
        address: RemoteAddress,
        segment: int,
        fingerprint: Fingerprint,
        *,
        io_threads: int = 2,
        probe_seconds: tuple[float, float] = PROBE_SECONDS,
    ) -> None:
        self.master = address.master
        self.stats = RemoteStats()
        self.outages = 0
        """How often what was known of the store became void."""
        self._client = RemoteClient(address, segment)
        self._health = Health(f"mooncake://{address.master}", *probe_seconds, errors_in_a_row=1, healthy=False)
        self._health.on_outage = self._lost
        self._queue = IoQueue(io_threads, name="remote")
        self._changed = threading.Event()
        self._closing = False
        self._lock = threading.Lock()
        self._keeper = threading.Thread(target=self._keep, name="remote-keeper", daemon=True)
        self.serve(fingerprint)

    def open(self, host: HostTier) -> None:
        """Start to reach the store; pages will move from and to the arena of `host`."""
        self._page_bytes, self.stride = host.layout.page_bytes, host.layout.stride
        self._base = host.arena.data_ptr()
        self._trailers = np.zeros(host.capacity, np.uint64)
        self._memory = [
            (self._base, host.arena.numel()),
            (self._trailers.ctypes.data, self._trailers.nbytes),
        ]
        self._keeper.start()

    @property
    def healthy(self) -> bool:
        """False: out of service, comes back by itself."""
        return self._health.healthy and self._prefix is not None and not self._closing

    @property
    def errors(self) -> int:
        return self._health.errors

    def serve(self, fingerprint: Fingerprint) -> None:
        """From now on the pages are those of `fingerprint`."""
        self._prefix: str | None = fingerprint.digest()

    def pause(self) -> None:
        """Out of service until `serve`: the pages in host memory are of no fingerprint."""
        self._prefix = None
        self._lost()

    def exist(self, keys: Sequence[bytes]) -> Future[list[int]]:
        """How many leading `keys` are in the store, as the only item; 0 where it cannot be asked."""
        ticket = Ticket(1, 0)
        self._submit(Priority.NOW, ticket, partial(self._exist, list(map(self._object, keys))))
        return ticket.future

    def read(self, pages: Sequence[PageRead]) -> Future[list[ReadOutcome]]:
        """Fill the pages' buffers, verified; their slots and checksums mean nothing. See `DiskTier.read`."""
        ticket = Ticket(len(pages), ReadOutcome.UNAVAILABLE)
        self._submit(Priority.NOW, ticket, partial(self._in_calls, self._get, self._extents(pages), pages))
        return ticket.future

    def write(self, pages: Sequence[PageWrite]) -> Future[list[int | None]]:
        """Put pages; per page 0 once it is there, None where it is not."""
        for page in pages:
            self._trailers[self._slot(page.buffer)] = page.checksum
        ticket = Ticket[int | None](len(pages), None)
        self._submit(Priority.WRITE, ticket, partial(self._in_calls, self._put, self._extents(pages), pages))
        return ticket.future

    def remove(self, keys: Iterable[bytes]) -> None:
        """Forget pages, as far as the store can be reached now."""
        objects = list(map(self._object, keys))
        if objects:
            self._submit(Priority.WRITE, Ticket(0, None), partial(self._remove, objects))

    def checksum(self, buffer: memoryview) -> int:
        """Of the page that was read into `buffer`."""
        return int(self._trailers[self._slot(buffer)])

    def close(self, timeout: float = 5.0) -> bool:
        """Let what runs end and leave the store, which loses the pages in our memory.

        False where a call still runs after `timeout` seconds.
        """
        deadline = time.monotonic() + timeout
        self._closing = True
        self._changed.set()
        ended = self._queue.close(timeout)
        leave = threading.Thread(target=self._client.close, name="remote-close", daemon=True)
        if ended:
            leave.start()
            leave.join(max(0.0, deadline - time.monotonic()))
        return ended and not leave.is_alive()

    # On the tier's threads

    def _keep(self) -> None:
        """Reach the store at first, and again whenever it was lost."""
        while not self._closing:
            seconds = self._health.seconds_to_probe()
            if seconds is not None and seconds <= 0:
                self._health.probed(self._reach())
                continue
            self._changed.wait(seconds)
            self._changed.clear()

    def _reach(self) -> bool:
        try:
            if self._client.connected:
                self._client.ping()
                self._client.exist(["probe"])
            else:
                self._client.connect(self._memory)
        except RemoteError as error:
            self._health.warn(error)
            return False
        return True

    def _lost(self) -> None:
        self.outages += 1
        self._changed.set()

    def _submit(self, priority: Priority, ticket: Ticket, job: Callable[[Ticket], None]) -> None:
        if not (self.healthy and self._queue.submit(priority, [partial(self._run, ticket, job)])):
            ticket.begin()
            ticket.finish()

    def _run(self, ticket: Ticket, job: Callable[[Ticket], None]) -> None:
        try:
            if ticket.begin() and self.healthy:
                job(ticket)
        except CALL_ERRORS as error:
            self._health.failed(error)
        finally:
            ticket.finish()

    def _exist(self, objects: Sequence[str], ticket: Ticket[int]) -> None:
        there = self._client.exist(objects)
        ticket.settle(0, there.index(False) if False in there else len(there))

    def _in_calls(
        self,
        call: Callable[[Sequence[Extent], Sequence], Iterable],
        extents: Sequence[Extent],
        pages: Sequence[PageRead] | Sequence[PageWrite],
        ticket: Ticket,
    ) -> None:
        for first in range(0, len(pages), CALL_PAGES):
            some = slice(first, first + CALL_PAGES)
            for place, result in enumerate(call(extents[some], pages[some]), first):
                ticket.settle(place, result)

    def _get(self, extents: Sequence[Extent], pages: Sequence[PageRead]) -> Iterable[ReadOutcome]:
        codes = self._client.get(extents)
        return [self._verify(*one) for one in zip(extents, pages, codes, strict=True)]

    def _verify(self, extent: Extent, page: PageRead, code: int) -> ReadOutcome:
        size = self._page_bytes + TRAILER_BYTES
        if code == size and page_checksum(page.key, page.buffer[: self._page_bytes]) == self.checksum(
            page.buffer
        ):
            self._count(got=1)
            return ReadOutcome.READ
        if code == size or (code != NOT_FOUND and self._client.size(extent.key) not in (size, NOT_FOUND)):
            self._client.remove([extent.key])  # A good one could never take its place.
            self._count(damaged=1)
        else:
            if code != NOT_FOUND:
                self._health.warn(RemoteError(f"pages cannot be had from the server that has them, error {code}"))
            self._count(missed=1)
        return ReadOutcome.LOST

    def _put(self, extents: Sequence[Extent], _pages: Sequence[PageWrite]) -> Iterable[int | None]:
        done = self._client.put(extents)
        self._count(put=sum(done), refused=len(done) - sum(done))
        return [0 if there else None for there in done]

    def _remove(self, objects: Sequence[str], _ticket: Ticket) -> None:
        self._client.remove(objects)

    def _count(self, **counts: int) -> None:
        with self._lock:
            for name, count in counts.items():
                setattr(self.stats, name, getattr(self.stats, name) + count)

    def _object(self, key: bytes) -> str:
        return f"{self._prefix}/{key.hex()}"

    def _extents(self, pages: Sequence[PageRead] | Sequence[PageWrite]) -> list[Extent]:
        return [self._extent(page.key, self._slot(page.buffer)) for page in pages]

    def _extent(self, key: bytes, slot: int) -> Extent:
        addresses = self._base + slot * self.stride, self._trailers.ctypes.data + slot * TRAILER_BYTES
        return Extent(self._object(key), addresses, (self._page_bytes, TRAILER_BYTES))

    def _slot(self, buffer: memoryview) -> int:
        """Of the arena, that `buffer` is."""
        return (np.frombuffer(buffer, np.uint8).ctypes.data - self._base) // self.stride
