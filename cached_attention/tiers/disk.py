"""The disk tier: page records that survive a restart and a crash.

A page is reported as saved once its bytes, and then its index row, are on stable storage. A crash at any point
loses pages but never yields a wrong one: a record is valid only if it hashes, with its key, to the checksum in
its row. Slots have no header: it would repeat the row, and cost the alignment that lets one `preadv` fill the
arena. The price: without its index a store is empty.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future
from contextlib import closing
from functools import partial
from pathlib import Path

from cached_attention.encryption import EncryptionKey
from cached_attention.fingerprint import Fingerprint
from cached_attention.tiers.disk_committer import Committer
from cached_attention.tiers.disk_directory import INDEX_NAME
from cached_attention.tiers.disk_files import FileIO, NoRoomError
from cached_attention.tiers.disk_index import (
    INDEX_ERRORS,
    open_read_only,
    stream_rows,
)
from cached_attention.tiers.disk_opening import open_store
from cached_attention.tiers.disk_requests import OpenRequests
from cached_attention.tiers.disk_rows import DiskRecord, RecordColumns
from cached_attention.tiers.disk_runs import IO_ERRORS, PlacedRead, Run, read_run, runs
from cached_attention.tiers.disk_slots import FREE, REMOVING, SAVED, SlotTable
from cached_attention.tiers.disk_space import disk_usage, slot_stride
from cached_attention.tiers.disk_sweeper import Sweeper
from cached_attention.tiers.health import Health
from cached_attention.tiers.io_queue import IoQueue, Kind
from cached_attention.tiers.page_io import DiskStats, PageRead, PageWrite, ReadOutcome, Ticket

logger = logging.getLogger(__name__)

GRACE_SECONDS = 0.5
"""Seconds that `close` gives threads to end, even if its own timeout is over."""


class DiskTier:
    """Page records of one fingerprint in `directory`.

    Only the constructor, `flush`, `close` and `check_invariants` wait for the disk; `records` and
    `record_columns` read the index as they are iterated. All other methods may be called from any thread. Futures
    are completed on the tier's own threads: callbacks must be short.

    Args:
        directory: one owner at a time; created if missing.
        capacity_bytes: upper limit of `directory` in file system blocks, including everything in it: other
            fingerprints' stores and foreign files count too.
        io_threads: number of concurrent writes; each `read` call may use one more, independently of other calls.
        queued_write_bytes: writes are declined while this much is queued.
        ttl: seconds since its last use after which a page, or another fingerprint's whole store, is dropped when
            the store is opened; None: never.
        probe_seconds: first and longest interval between attempts to return to service.
        encryption: key to encrypt the store with; it is a different store from the unencrypted one.
        whole: the server's directory, if it has one per rank in it; `directory` unless given. Its ranks share it,
            and no server with one rank can have it meanwhile.

    Raises:
        DirectoryInUseError: another process owns the directory.
        OSError, sqlite3.Error: the directory cannot be used.
        ValueError: `capacity_bytes` does not hold one page.
    """

    def __init__(
        self,
        directory: Path,
        fingerprint: Fingerprint,
        capacity_bytes: int,
        *,
        io: FileIO | None = None,
        io_threads: int = 4,
        queued_write_bytes: int = 1 << 30,
        ttl: float | None = None,
        probe_seconds: tuple[float, float] = (1.0, 60.0),
        encryption: EncryptionKey | None = None,
        whole: Path | None = None,
    ) -> None:
        if encryption is not None:
            fingerprint = fingerprint.encrypted(encryption.id)
        self.directory = directory
        self.page_bytes = fingerprint.page_bytes
        self.capacity_bytes = capacity_bytes
        self.stats = DiskStats()
        self._closing = self._given_up = self._closed = False
        whole = whole or directory
        self._store = open_store(
            directory,
            whole,
            fingerprint,
            encryption,
            capacity_bytes,
            io or FileIO(),
            ttl,
        )
        self.stride = self._store.files.stride
        """Bytes per slot."""
        self._records = self._store.records
        self.path = self._store.path
        self.stats.dropped = self._store.dropped
        self._files = self._store.files
        self._slots = SlotTable(self._store.states, self._files.end(), self._files.missing(self._files.end()))
        self._requests = OpenRequests(
            self._slots, self._files.has_space, self.stats, queued_write_bytes // self.stride, self.path
        )
        self._growth = self._store.growth
        if self._store.room <= self._files.end():
            self._growth.pause()
        self._read_health = Health(f"{self.path}, reads", *probe_seconds)
        self._write_health = Health(f"{self.path}, writes", *probe_seconds)
        self._queue = IoQueue(io_threads)
        self._committer = Committer(
            self._store.index,
            self._read_health,
            self._write_health,
            self._requests,
            self._files.sync,
            self._files.probe,
        )
        self._sweeper: Sweeper | None = None
        if ttl is not None:
            self._sweeper = Sweeper(self.path, whole, ttl)

    @property
    def healthy(self) -> bool:
        """False while out of service after errors, until it recovers on its own; reads may still be served."""
        return self._read_health.healthy and self._write_health.healthy and not self._closing

    @property
    def io_errors(self) -> int:
        return self._read_health.errors + self._write_health.errors

    @property
    def checksum_failures(self) -> int:
        """Pages that were damaged, short or foreign when read back."""
        return self._read_health.damaged

    @property
    def capacity_slots(self) -> int:
        """Slots that there was room for when the store was opened, or has been since."""
        return max(self._store.room, self._files.end())

    @property
    def pages(self) -> int:
        """Number of saved pages. Scans all slots."""
        return self._slots.states.count(SAVED)

    @property
    def free_slots(self) -> int:
        """Slots available for writing now."""
        return self._slots.free if self._growth.is_on else self._slots.recycled

    @property
    def removing(self) -> int:
        """Slots that become free once the removal of their pages is durable."""
        return self._requests.removing

    @property
    def write_room(self) -> int:
        """Pages that may still be queued for writing; more are declined."""
        return self._requests.write_room

    @property
    def direct(self) -> bool:
        """Whether I/O bypasses the page cache."""
        return self._files.direct

    def records(self) -> Iterator[DiskRecord]:
        """Records of `record_columns`, one by one."""
        for some in self.record_columns():
            yield from map(DiskRecord, *some)

    def record_columns(self) -> Iterator[RecordColumns]:
        """What the store held when it was opened, by slot; iterate once, before the first write.

        A key occurs twice only if the index was damaged: `remove` the slot that is not kept. Rows that are
        damaged or cannot be read are left out, and removed at the end.
        """
        unread = bytearray(self._slots.states)
        try:
            with closing(open_read_only(self.path / INDEX_NAME)) as connection:
                rows = self._store.index.rows
                for some in rows.record_columns(stream_rows(connection, rows)):
                    for slot in some.slot:
                        unread[slot] = REMOVING
                    yield some
        except INDEX_ERRORS as error:
            self._read_health.failed(error)
        left = [slot for slot, state in enumerate(unread) if state == SAVED] if SAVED in unread else []
        if left:
            logger.warning("%s: %d damaged index rows; their pages are lost.", self.path, len(left))
            self.stats.dropped += len(left)
            self.remove(left)

    def write(self, pages: Sequence[PageWrite]) -> Future[list[int | None]]:
        """Save pages; for each its slot once it is durable, or None if it was declined or failed.

        If not all fit, the first ones are accepted.
        """
        self._check_buffers(pages)
        ticket, slots = self._requests.begin_write(len(pages), accepts=self.healthy, may_grow=self._growth.is_on)
        jobs = [partial(self._write_run, run) for run in runs(zip(slots, pages, strict=False), self._files)]
        if jobs and not self._queue.submit(Kind.WRITE, jobs):
            self._requests.failed(slots)
        return ticket.future

    def read(self, pages: Sequence[PageRead]) -> Future[list[ReadOutcome]]:
        """Fill and verify the pages' buffers. `cancel` works until the first of them is started."""
        self._check_buffers(pages)
        ticket = self._requests.begin_read(len(pages))
        items = [(page.slot, PlacedRead(place, page)) for place, page in enumerate(pages)]
        jobs = [partial(self._read_run, ticket, run) for run in runs(items, self._files)]
        if not (jobs and not self._closing and self._read_health.healthy and self._queue.submit(Kind.READ, jobs)):
            outcomes = [(place, ReadOutcome.UNAVAILABLE) for place in range(len(pages))]
            self._requests.settle_reads(ticket, outcomes)
        return ticket.future

    def remove(self, slots: Iterable[int]) -> None:
        """Forget saved pages. A slot becomes free once that is durable.

        Raises:
            ValueError: a slot holds no saved page.
        """
        slots = list(slots)
        self._requests.begin_removal(slots)
        self._committer.remove(slots)

    def touch(self, slot: int, last_use: float, uses: int) -> None:
        """Record a use of a saved page; persisted within seconds, lost in a crash before that."""
        if self._slots.states[slot] == SAVED:
            self._committer.touch(slot, last_use, uses)

    def flush(self, timeout: float) -> bool:
        """Wait until everything requested is done; False if `timeout` (seconds) was too short."""
        deadline = time.monotonic() + timeout
        return self._queue.wait_idle(timeout) and self._committer.flush(max(0.0, deadline - time.monotonic()))

    def close(self, timeout: float = 10.0) -> bool:
        """Finish what is possible in `timeout` seconds, give up the rest, release the directory.

        All futures are done afterwards. False if a thread is still blocked on the disk: then the directory stays
        owned until the process ends.
        """
        if self._closed:
            return True
        deadline = time.monotonic() + timeout
        self._closing = True
        self.flush(timeout)
        self._given_up = True
        ended = self._queue.close(max(GRACE_SECONDS, deadline - time.monotonic()))
        ended = self._committer.close(max(GRACE_SECONDS, deadline - time.monotonic())) and ended
        if self._sweeper is not None:
            ended = self._sweeper.close(max(GRACE_SECONDS, deadline - time.monotonic())) and ended
        self._closed = True
        self._requests.abandon()
        if ended:
            self._store.close(self._slots.states.rfind(SAVED) + 1)
        return ended

    def check_invariants(self) -> None:
        """Check that slots, index and files agree and the directory is within its limit; waits for pending work.

        Raises:
            AssertionError: they do not.
        """
        assert self.flush(60), "pending work did not end"
        states = self._requests.check_invariants()
        with closing(open_read_only(self.path / INDEX_NAME)) as connection:
            rows = {slot for (slot,) in connection.execute("SELECT slot FROM pages")}
        assert rows == {slot for slot, state in enumerate(states) if state == SAVED}, "index and slots differ"
        assert states.count(SAVED) + states.count(FREE) == len(states), "a slot is left between states"
        assert all(slot < self._files.end() for slot in rows), "a page lies beyond its file"
        usage = disk_usage(self.directory)
        assert usage <= self.capacity_bytes, f"{usage} bytes on disk, {self.capacity_bytes} allowed"

    def _check_buffers(self, pages: Sequence[PageRead] | Sequence[PageWrite]) -> None:
        expected = slot_stride(self.page_bytes)
        for page in pages:
            if page.buffer.nbytes != expected:
                raise ValueError(f"a buffer of {page.buffer.nbytes} bytes; slots have {expected}: give that.")

    def _write_run(self, run: Run[PageWrite]) -> None:
        slots = [slot for slot, _ in run]
        if self._given_up or not self._write_health.healthy:
            self._requests.failed(slots)
            return
        try:
            self._files.write(slots[0], self._records.outgoing([page for _, page in run]))
        except NoRoomError as error:
            self._growth.failed(error)
            self._requests.failed(slots)
        except IO_ERRORS as error:
            self._write_health.failed(error)
            self._requests.failed(slots)
        except Exception as error:
            self._write_health.failed(error)
            self._requests.failed(slots)
            raise
        else:
            self._committer.save(
                DiskRecord(
                    page.key, slot, page.parent, page.base_position, page.checksum, page.last_use, page.uses
                )
                for slot, page in run
            )

    def _read_run(self, ticket: Ticket[ReadOutcome], run: Run[PlacedRead]) -> None:
        wanted = self._requests.is_wanted(ticket) and not self._given_up
        outcomes = [(item.place, ReadOutcome.UNAVAILABLE) for _, item in run]
        try:
            if wanted:
                outcomes = list(read_run(run, self._files, self._read_health, self._records))
        finally:
            self._requests.settle_reads(ticket, outcomes)
