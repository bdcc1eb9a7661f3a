"""The remote tier: page records of one fingerprint in a Mooncake store that several servers share.

An object is a page record followed by its checksum over key and bytes. Its name consists of the fingerprint's and
the page's, so that servers never see pages they must not share. Records move between arena and wire without a
copy, or, with an encryption key, encrypted through the tier's own memory: see `Objects`. Only the store knows
which objects exist: it drops them when it is full, and together with the server whose memory holds them.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

from cached_attention.encryption import EncryptionKey
from cached_attention.fingerprint import Fingerprint
from cached_attention.tiers.health import Health
from cached_attention.tiers.host import HostTier
from cached_attention.tiers.io_queue import IoQueue, Kind
from cached_attention.tiers.page_io import PageRead, PageWrite, ReadOutcome, Ticket
from cached_attention.tiers.remote_address import RemoteAddress
from cached_attention.tiers.remote_client import NOT_FOUND, Extent, RemoteClient, RemoteError
from cached_attention.tiers.remote_records import Objects, RecordMemory, objects_maker

R = TypeVar("R")
Page = TypeVar("Page", PageRead, PageWrite)

logger = logging.getLogger(__name__)

PROBE_SECONDS = (1.0, 10.0)
CALL_ERRORS = (RemoteError, RuntimeError, TypeError, ValueError)
"""Our own errors, and those of Mooncake's binding."""


@dataclass
class RemoteStats:
    """Counts since the tier was created, in pages."""

    got: int = 0
    put: int = 0
    refused: int = 0
    """Not put: no free memory in the store, or out of service."""
    missed: int = 0
    """Requested but no longer there, or the server that held them is gone."""
    damaged: int = 0
    """Short, foreign, not encrypted with this key, or not the bytes that were saved; removed."""


class RemoteTier:
    """Puts pages into the remote store and gets them back; see `PageSource`.

    Only `close` waits for the network. Futures are completed on the tier's own threads. Until the store is
    reached, and whenever it cannot be, the tier is out of service: it finds nothing and puts nothing.

    Args:
        segment: bytes of this process's memory that the store may use for any server's pages.
        encryption: key to encrypt pages with; they are shared only with servers that have it.
        probe_seconds: first and longest interval between attempts to reach the store.
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
        """How often all knowledge of the store's content became invalid."""
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
        """Start to connect to the store; pages will move from and to the arena of `host`."""
        self.stride = host.layout.stride
        self._memory = RecordMemory(host)
        self._make_objects, self._regions = objects_maker(self._memory, self._encryption, self._queue.threads)
        self.serve(self._fingerprint)
        self._keeper.start()

    @property
    def healthy(self) -> bool:
        """False while out of service, until it recovers on its own."""
        return self._health.healthy and self._objects is not None and not self._closing

    @property
    def errors(self) -> int:
        return self._health.errors

    def serve(self, fingerprint: Fingerprint) -> None:
        """Use the pages of `fingerprint` from now on."""
        self._objects = objects = self._make_objects(fingerprint)
        logger.info("mooncake://%s: the pages of this rank are named %s/...", self.master, objects.prefix)

    def pause(self) -> None:
        """Out of service until `serve`: the pages in host memory have no fingerprint."""
        self._objects = None
        self._lost()

    def exist(self, keys: Sequence[bytes]) -> Future[list[int]]:
        """For each of `keys` 1 if it is in the store, else 0; 0 for all if the store cannot be asked."""
        ticket = Ticket(len(keys), 0)
        self._submit(Kind.READ, ticket, self._exist, keys)
        return ticket.future

    def read(self, pages: Sequence[PageRead]) -> Future[list[ReadOutcome]]:
        """Fill and verify the pages' buffers; their slots and checksums are ignored. See `DiskTier.read`."""
        ticket = Ticket(len(pages), ReadOutcome.UNAVAILABLE)
        self._submit(Kind.READ, ticket, self._in_calls, self._get, pages)
        return ticket.future

    def write(self, pages: Sequence[PageWrite]) -> Future[list[int | None]]:
        """Put pages; for each 0 once it is in the store, or None."""
        ticket = Ticket[int | None](len(pages), None)
        self._submit(Kind.WRITE, ticket, self._in_calls, self._put, pages)
        return ticket.future

    def remove(self, keys: Iterable[bytes]) -> None:
        """Remove pages, if the store can be reached now."""
        if keys := list(keys):
            self._submit(Kind.WRITE, Ticket(0, None), self._remove, keys)

    def checksum(self, buffer: memoryview) -> int:
        """Checksum of the page that was read into `buffer`."""
        return self._memory.checksum(buffer)

    def close(self, timeout: float = 5.0) -> bool:
        """Let running calls end and leave the store, which loses the pages in our memory.

        False if a call still runs after `timeout` seconds.
        """
        deadline = time.monotonic() + timeout
        self._closing = True
        self._changed.set()
        ended = self._queue.close(timeout)
        if self._keeper.ident is not None:
            # It may be connecting: a store that is joined after this would keep memory that is not ours any more.
            self._keeper.join(max(0.0, deadline - time.monotonic()))
            ended = ended and not self._keeper.is_alive()
        leave = threading.Thread(target=self._client.close, name="remote-close", daemon=True)
        if ended:
            leave.start()
            leave.join(max(0.0, deadline - time.monotonic()))
        return ended and not leave.is_alive()

    # On the tier's threads

    def _keep(self) -> None:
        """Connect to the store, and again whenever the connection was lost."""
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
                if self._closing:
                    self._client.close()  # `close` may have given up waiting for this call.
        except (*CALL_ERRORS, OSError) as error:
            self._health.warn(error)
            return False
        return True

    def _lost(self) -> None:
        self.outages += 1
        self._changed.set()

    def _submit(self, kind: Kind, ticket: Ticket[R], job: Callable[..., None], *arguments: Any) -> None:
        """Call `job` with the objects that are served now, the arguments and the ticket."""
        objects = self._objects
        run = partial(self._run, ticket, partial(job, objects, *arguments))
        if not (objects is not None and self.healthy and self._queue.submit(kind, [run])):
            ticket.begin()
            ticket.finish()

    def _run(self, ticket: Ticket[R], job: Callable[[Ticket[R]], None]) -> None:
        try:
            if ticket.begin() and self.healthy:
                job(ticket)
        except CALL_ERRORS as error:
            self._health.failed(error)
        finally:
            ticket.finish()

    def _exist(self, objects: Objects, keys: Sequence[bytes], ticket: Ticket[int]) -> None:
        for place, there in enumerate(self._client.exist(list(map(objects.name, keys)))):
            ticket.settle(place, int(there))

    def _in_calls(
        self,
        objects: Objects,
        call: Callable[[Objects, Sequence[Page]], Iterable[R]],
        pages: Sequence[Page],
        ticket: Ticket[R],
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
            self._client.remove([extent.key])  # Otherwise a good one could never take its place.
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

    def _remove(self, objects: Objects, keys: Sequence[bytes], _ticket: Ticket[None]) -> None:
        self._client.remove(list(map(objects.name, keys)))

    def _count(self, **counts: int) -> None:
        with self._lock:
            for name, count in counts.items():
                setattr(self.stats, name, getattr(self.stats, name) + count)
