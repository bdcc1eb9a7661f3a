"""The remote tier: page records of one fingerprint in a Mooncake store that several servers share.

An object is a page record and, behind it, its checksum over key and bytes. Its name is that of the fingerprint
and of the page, so servers that may not share pages never meet. Records go from the arena to the wire and back
without a copy, or, with a key of the operator's, encrypted through memory of the tier's own: see `Objects`. Which
objects there are is known to the store alone: it drops them when it is full, and with the server whose memory
they lie in.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from functools import partial
from typing import Any

from cached_attention.encryption import EncryptionKey
from cached_attention.fingerprint import Fingerprint
from cached_attention.tiers.disk_health import Health
from cached_attention.tiers.disk_pages import PageRead, PageWrite, ReadOutcome, Ticket
from cached_attention.tiers.disk_queue import IoQueue, Priority
from cached_attention.tiers.host import HostTier
from cached_attention.tiers.remote_address import RemoteAddress
from cached_attention.tiers.remote_client import NOT_FOUND, Extent, RemoteClient, RemoteError
from cached_attention.tiers.remote_records import Objects, RecordMemory, objects_maker

logger = logging.getLogger(__name__)

PROBE_SECONDS = (1.0, 10.0)
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
    """Short, foreign, not sealed with this key, or bytes other than were saved; removed."""


class RemoteTier:
    """Puts pages into the remote store and gets them back; see `PageSource`.

    No method waits for the network but `close`. Futures are completed on the tier's own threads. Until the
    store is reached, and whenever it cannot be, the tier is out of service: nothing is there, nothing is put.

    Args:
        segment: bytes of this process's memory that the store may use for anybody's pages.
        encryption: pages are sealed with this key, and shared with servers that have it only.
        probe_seconds: between attempts to reach the store, at first and at most.
    """

    def __init__(
        self,
        address: RemoteAddress,
        segment: int,
        fingerprint: Fingerprint,
        *,
        encryption: EncryptionKey | None = None,
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
        self._encryption = encryption
        self._fingerprint = fingerprint
        self._objects: Objects | None = None

    def open(self, host: HostTier) -> None:
        """Start to reach the store; pages will move from and to the arena of `host`."""
        self.stride = host.layout.stride
        self._memory = RecordMemory(host)
        self._make_objects, self._regions = objects_maker(self._memory, self._encryption, self._queue.threads)
        self.serve(self._fingerprint)
        self._keeper.start()

    @property
    def healthy(self) -> bool:
        """False: out of service, comes back by itself."""
        return self._health.healthy and self._objects is not None and not self._closing

    @property
    def errors(self) -> int:
        return self._health.errors

    def serve(self, fingerprint: Fingerprint) -> None:
        """From now on the pages are those of `fingerprint`."""
        self._objects = objects = self._make_objects(fingerprint)
        logger.info("mooncake://%s: the pages of this rank are named %s/...", self.master, objects.prefix)

    def pause(self) -> None:
        """Out of service until `serve`: the pages in host memory are of no fingerprint."""
        self._objects = None
        self._lost()

    def exist(self, keys: Sequence[bytes]) -> Future[list[int]]:
        """How many leading `keys` are in the store, as the only item; 0 where it cannot be asked."""
        ticket = Ticket(1, 0)
        self._submit(Priority.NOW, ticket, self._exist, keys)
        return ticket.future

    def read(self, pages: Sequence[PageRead]) -> Future[list[ReadOutcome]]:
        """Fill the pages' buffers, verified; their slots and checksums mean nothing. See `DiskTier.read`."""
        ticket = Ticket(len(pages), ReadOutcome.UNAVAILABLE)
        self._submit(Priority.NOW, ticket, self._in_calls, self._get, pages)
        return ticket.future

    def write(self, pages: Sequence[PageWrite]) -> Future[list[int | None]]:
        """Put pages; per page 0 once it is there, None where it is not."""
        ticket = Ticket[int | None](len(pages), None)
        self._submit(Priority.WRITE, ticket, self._in_calls, self._put, pages)
        return ticket.future

    def remove(self, keys: Iterable[bytes]) -> None:
        """Forget pages, as far as the store can be reached now."""
        if keys := list(keys):
            self._submit(Priority.WRITE, Ticket(0, None), self._remove, keys)

    def checksum(self, buffer: memoryview) -> int:
        """Of the page that was read into `buffer`."""
        return self._memory.checksum(buffer)

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
                self._client.connect(self._regions)
        except RemoteError as error:
            self._health.warn(error)
            return False
        return True

    def _lost(self) -> None:
        self.outages += 1
        self._changed.set()

    def _submit(self, priority: Priority, ticket: Ticket, job: Callable[..., None], *arguments: Any) -> None:
        """Call `job` with the objects that are served now, the arguments and the ticket."""
        objects = self._objects
        run = partial(self._run, ticket, partial(job, objects, *arguments))
        if not (objects is not None and self.healthy and self._queue.submit(priority, [run])):
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

    def _exist(self, objects: Objects, keys: Sequence[bytes], ticket: Ticket[int]) -> None:
        there = self._client.exist(list(map(objects.name, keys)))
        ticket.settle(0, there.index(False) if False in there else len(there))

    def _in_calls(
        self,
        objects: Objects,
        call: Callable[[Objects, Sequence], Iterable],
        pages: Sequence[PageRead] | Sequence[PageWrite],
        ticket: Ticket,
    ) -> None:
        for first in range(0, len(pages), objects.call_pages):
            some = pages[first : first + objects.call_pages]
            for place, result in enumerate(call(objects, some), first):
                ticket.settle(place, result)

    def _get(self, objects: Objects, pages: Sequence[PageRead]) -> Iterable[ReadOutcome]:
        extents = objects.incoming(pages)
        codes = self._client.get(extents)
        return [self._verify(objects, *one) for one in zip(extents, pages, codes, strict=True)]

    def _verify(self, objects: Objects, extent: Extent, page: PageRead, code: int) -> ReadOutcome:
        size = objects.object_bytes
        if code == size and objects.accept(page, extent):
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

    def _put(self, objects: Objects, pages: Sequence[PageWrite]) -> Iterable[int | None]:
        done = self._client.put(objects.outgoing(pages))
        self._count(put=sum(done), refused=len(done) - sum(done))
        return [0 if there else None for there in done]

    def _remove(self, objects: Objects, keys: Sequence[bytes], _ticket: Ticket) -> None:
        self._client.remove(list(map(objects.name, keys)))

    def _count(self, **counts: int) -> None:
        with self._lock:
            for name, count in counts.items():
                setattr(self.stats, name, getattr(self.stats, name) + count)
