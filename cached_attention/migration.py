"""Pages on their way between host memory and disk.

Write-behind copies what is dirty to disk, coldest first, so that a host slot can be taken without waiting.
Fetch brings the pages of one request back, head first, and holds them until the request runs or leaves.
"""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from typing import NamedTuple

from cached_attention.hierarchy import Hierarchy
from cached_attention.index import NOWHERE, PageKey
from cached_attention.tiers.disk import DiskTier, PageRead, PageWrite, ReadOutcome

logger = logging.getLogger(__name__)

BATCH_PAGES = 32
"""Pages per write; the disk tier merges neighbours and commits once per batch."""
BATCHES_IN_FLIGHT = 2
ROOM_PAUSE = 0.5
"""Seconds before more room is made on a full disk: slots come free once their removal is durable."""
PATIENCE = 5.0
"""Seconds that a request waits for the disk before it runs with what is there."""
FLUSH_REPORT = 2.0
"""Seconds between log lines of a long flush."""


class WriteBehind:
    """Copies dirty pages to disk. All calls come from one thread; `poll` never waits.

    Args:
        min_uses: a page is written once it was used this often; saves the disk what is never asked for.
    """

    def __init__(self, pages: Hierarchy, disk: DiskTier, min_uses: int, clock: Callable[[], float]) -> None:
        self._pages = pages
        self._disk = disk
        self._min_uses = min_uses
        self._clock = clock
        self._writes: deque[tuple[list[int], Future[list[int | None]]]] = deque()
        self._make_room_at = 0.0

    @property
    def rows_in_flight(self) -> int:
        return sum(len(rows) for rows, _ in self._writes)

    def poll(self) -> None:
        """Take note of what was written, and write more."""
        while self._writes and self._writes[0][1].done():
            self._settle(*self._writes.popleft())
        while len(self._writes) < BATCHES_IN_FLIGHT and self._disk.healthy:
            if not (rows := self._choose()):
                break
            self._writes.append((rows, self._disk.write([self._page_write(row) for row in rows])))

    def _choose(self) -> list[int]:
        rows: list[int] = []
        while len(rows) < BATCH_PAGES and (row := self._pages.dirty_order.take()) is not None:
            if self._disk.free_slots <= len(rows) and (rows or self._make_room(row)):
                self._pages.offer(row)
                break
            self._pages.launder(row)
            if self._disk.free_slots <= len(rows):
                continue  # All that is on disk was used later than this.
            if self._pages.index.uses[row] >= self._min_uses:
                self._pages.pin(row)
                rows.append(row)
        return rows

    def _make_room(self, row: int) -> bool:
        """Remove from a full disk what is colder than `row`; its slots are free at a later poll.

        False where nothing is colder.
        """
        now = self._clock()
        if now >= self._make_room_at:
            slots = self.evict(BATCH_PAGES * BATCHES_IN_FLIGHT, self._pages.index.last_use[row])
            if not slots:
                return False
            self._make_room_at = now + ROOM_PAUSE
            self._disk.remove(slots)
        return True

    def evict(self, count: int, limit: float) -> list[int]:
        """Disk slots of up to `count` pages last used before `limit`; they are in the tier no more."""
        slots: list[int] = []
        while len(slots) < count and (victim := self._pages.disk_order.take(limit)) is not None:
            slots.append(self._pages.leave_disk(victim))
        return slots

    def _page_write(self, row: int) -> PageWrite:
        index, parent = self._pages.index, self._pages.index.parent[row]
        return PageWrite(
            key=index.key(row),
            parent=None if parent == NOWHERE else index.key(parent),
            base_position=index.position[row],
            checksum=index.checksum[row],
            last_use=index.last_use[row],
            uses=index.uses[row],
            buffer=self._pages.host.slot_bytes(self._pages.in_host.slot[row]),
        )

    def _settle(self, rows: list[int], future: Future[list[int | None]]) -> None:
        for row, slot in zip(rows, future.result(), strict=True):
            if slot is None:
                self._pages.soil(row)
            else:
                self._pages.settle_on_disk(row, slot)
            self._pages.unpin(row)

    def wait(self) -> None:
        """Until the disk touches no page of the arena."""
        while self._writes:
            rows, future = self._writes.popleft()
            future.exception()
            self._settle(rows, future)

    def flush(self, timeout: float) -> int:
        """Write what is dirty for at most `timeout` seconds; returns the pages that are still dirty."""
        deadline = time.monotonic() + timeout
        report = time.monotonic() + FLUSH_REPORT
        self.poll()
        while self._writes and time.monotonic() < deadline:
            time.sleep(0.005)
            self.poll()
            if time.monotonic() > report:
                report += FLUSH_REPORT
                left = self._pages.dirty.pages + self.rows_in_flight
                logger.info("CachedAttention: %d pages are still to be written to disk.", left)
        return self._pages.dirty.pages + self.rows_in_flight


class _Wait(NamedTuple):
    """What a request waits for: the pinned rows of its chain that were not in host memory."""

    first_page: int
    rows: list[int]
    give_up_at: float


class _Read(NamedTuple):
    rows: list[int]
    future: Future[list[ReadOutcome]]


class Fetch:
    """Brings pages from disk to host memory for requests that wait. All calls come from one thread."""

    def __init__(self, pages: Hierarchy, disk: DiskTier) -> None:
        self._pages = pages
        self._disk = disk
        self._reads: deque[_Read] = deque()
        self._waiting: dict[str, _Wait] = {}
        self.fetched = 0
        self.lost = 0

    @property
    def holds(self) -> int:
        """Pins held for requests and reads."""
        return sum(len(wait.rows) for wait in self._waiting.values()) + sum(
            len(read.rows) for read in self._reads
        )

    def start(self, request: str, keys: Sequence[PageKey]) -> None:
        """Fetch those of `keys`, the restorable chain of `request`, that are not in host memory."""
        self.release(request)
        index, first_page = self._pages.index, 0
        missing: list[int] = []
        rows: list[int] = []
        for i, key in enumerate(keys):
            row = index.find(key)
            if row not in self._pages.in_host:
                admitted = self._pages.admit(key, keys[i - 1] if i else None, index.position[row])
                if admitted is None:
                    break
                missing.append(row)
            if not self._pages.in_host.ready[row]:
                self._pages.pin(row)
                first_page = first_page if rows else i
                rows.append(row)
        if rows:
            self._waiting[request] = _Wait(first_page, rows, time.monotonic() + PATIENCE)
        if missing:
            reads = [self._page_read(row) for row in missing]
            self._reads.append(_Read(missing, self._disk.read(reads)))

    def _page_read(self, row: int) -> PageRead:
        index = self._pages.index
        buffer = self._pages.host.slot_bytes(self._pages.in_host.slot[row])
        return PageRead(index.key(row), self._pages.on_disk.slot[row], index.checksum[row], buffer)

    def holds_for(self, request: str) -> bool:
        return request in self._waiting

    def is_done(self, request: str) -> bool:
        """Whether nothing that `request` waits for is on its way any more, or it has waited long enough."""
        wait = self._waiting.get(request)
        if wait is None or time.monotonic() > wait.give_up_at:
            return True
        return not any(self._is_landing(row) for row in wait.rows)

    def arrived(self, request: str) -> tuple[int, int]:
        """Of what `request` waited for: the place in its chain of the first page, and how many are there."""
        wait = self._waiting.get(request)
        if wait is None:
            return 0, 0
        return wait.first_page, sum(bool(self._pages.in_host.ready[row]) for row in wait.rows)

    def _is_landing(self, row: int) -> bool:
        return row in self._pages.in_host and not self._pages.in_host.ready[row]

    def release(self, request: str) -> None:
        """Let go of what was held for `request`; reads go on, for others may wait for them."""
        wait = self._waiting.pop(request, None)
        for row in wait.rows if wait else ():
            self._pages.unpin(row)

    def poll(self) -> None:
        for read in [read for read in self._reads if read.future.done()]:
            self._reads.remove(read)
            self._settle(read)

    def _settle(self, read: _Read) -> None:
        removed: list[int] = []
        for row, outcome in zip(read.rows, read.future.result(), strict=True):
            if outcome is ReadOutcome.READ:
                self._pages.land(row, clean=True)
                self.fetched += 1
            else:
                self._pages.leave_host(row)
                if outcome is ReadOutcome.LOST:
                    removed.append(self._pages.leave_disk(row))
                    self.lost += 1
                self._pages.epoch += 1
            self._pages.unpin(row)
        self._disk.remove(removed)

    def wait(self) -> None:
        for read in self._reads:
            read.future.exception()
        self.poll()
        for request in list(self._waiting):
            self.release(request)
