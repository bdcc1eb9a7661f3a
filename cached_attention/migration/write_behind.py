"""Write-behind from host memory to disk, coldest pages first, so that host slots can be freed without waiting."""

from __future__ import annotations

import logging
import time
from concurrent.futures import Future

from cached_attention.hierarchy import Hierarchy
from cached_attention.index import NOWHERE
from cached_attention.migration.in_flight import InFlight
from cached_attention.stats import Direction, Reason
from cached_attention.tiers.page_io import PageWrite
from cached_attention.tiers.sources import PageDisk

logger = logging.getLogger(__name__)

BATCH_PAGES = 32
"""Pages per write; the disk tier merges neighbours and commits once per batch."""
BATCHES_IN_FLIGHT = 2
RESERVE = 0.1
"""Share of the host slots that should be free or clean; below it, writes no longer yield to reads."""
URGENT_BATCHES = 8
"""Batches in flight while the reserve is short; at most so many if the disk runs dry between passes."""
SHARE = 0.1
"""Share of the host slots that non-urgent writes may hold: their pages cannot be evicted."""
FLUSH_REPORT = 2.0
"""Seconds between log lines of a long flush."""


def page_write(pages: Hierarchy, row: int) -> PageWrite:
    """The record of `row`, which is in host memory, under the key with which it was saved."""
    index, origin = pages.index, pages.index.origin(row)
    parent = index.parent[origin]
    return PageWrite(
        key=index.key(origin),
        parent=None if parent == NOWHERE else index.key(parent),
        base_position=index.position[row],
        checksum=index.checksum[origin],
        last_use=index.last_use[row],
        uses=index.uses[row],
        buffer=pages.host.slot_bytes(pages.in_host.slot[row]),
    )


class WriteBehind:
    """Copies dirty pages to disk. All calls come from one thread; `poll` never waits.

    Every dirty page is written sooner or later, so that a crash loses little. Writes yield to reads, until so
    many host slots are dirty that freeing one might lose a page.

    Args:
        min_uses: write a page after this many uses; spares the disk pages that are never reused.
    """

    def __init__(self, pages: Hierarchy, disk: PageDisk, min_uses: int) -> None:
        self._pages = pages
        self._disk = disk
        self._min_uses = min_uses
        self._writes = InFlight(pages)
        self._depth = BATCHES_IN_FLIGHT
        share = int(SHARE * pages.host.capacity) // BATCH_PAGES
        self._deepest = min(URGENT_BATCHES, max(BATCHES_IN_FLIGHT, share))

    @property
    def rows_in_flight(self) -> int:
        return self._writes.rows

    def reserve_is_short(self, held: int = 0) -> bool:
        """Whether fewer host slots than the reserve are free or clean, not counting those of `held` pages."""
        taken = self._pages.dirty.pages + self.rows_in_flight + held
        return taken > (1 - RESERVE) * self._pages.host.capacity

    def poll(self, reading: bool = False, held: int = 0) -> None:
        """Process writes that have ended, and start more.

        `reading`: whether reads need the disk. `held`: pages that queued requests keep in host memory.
        """
        self._adapt_depth()
        urgent = self.reserve_is_short(held)
        batches = URGENT_BATCHES if urgent else 0 if reading else self._depth
        while len(self._writes) < batches and self._disk.healthy:
            if not (rows := self._choose(batches)):
                break
            rows.reverse()  # The head of a chain first: pages lie on disk in the order in which they are read.
            future = self._disk.write([page_write(self._pages, row) for row in rows])
            self._pages.stats.watch(Direction.DEMOTE, "disk", future, written)
            self._writes.add(rows, future)

    def _adapt_depth(self) -> None:
        """Enough batches in flight to keep the disk busy until the next pass."""
        was_writing = len(self._writes) > 0
        self.settle()
        if len(self._writes):
            self._depth = max(BATCHES_IN_FLIGHT, self._depth - 1)
        elif was_writing:
            self._depth = min(2 * self._depth, self._deepest)

    def _choose(self, batches: int) -> list[int]:
        """Rows of the next of `batches` writes."""
        rows: list[int] = []
        most = min(BATCH_PAGES, self._disk.write_room)
        while len(rows) < most and (row := self._pages.dirty_order.take()) is not None:
            if self._disk.free_slots <= len(rows) and (rows or self._make_room(row, batches * BATCH_PAGES)):
                self._pages.offer(row)
                break
            self._pages.mark_clean(row)
            if self._disk.free_slots <= len(rows):
                continue  # Everything on disk was used more recently.
            if self._pages.index.uses[row] >= self._min_uses:
                self._pages.pin(row)
                rows.append(row)
                self._want_before(row)
        return rows

    def _want_before(self, row: int) -> None:
        """Write the pages before `row` as well if a full disk has evicted them: without them it is of no use."""
        pages = self._pages
        while (row := pages.index.parent[row]) in pages.in_host:
            if row in pages.on_disk or row in pages.dirty or pages.index.pins[row]:
                return
            pages.mark_dirty(row)

    def _make_room(self, row: int, most: int) -> bool:
        """Evict up to `most` pages colder than `row` from a full disk; slots become free once that is durable.

        False if nothing is colder.
        """
        removing = self._disk.removing
        slots = self.evict(most - removing, self._pages.index.last_use[row])
        self._pages.stats.left("disk", Reason.ROOM, len(slots))
        if slots:
            self._disk.remove(slots)
        return bool(slots or removing)

    def evict(self, count: int, limit: float) -> list[int]:
        """Take up to `count` pages last used before `limit` off the disk; returns the slots that this frees."""
        slots: list[int] = []
        while len(slots) < count and (victim := self._pages.disk_order.take(limit)) is not None:
            sharers = list(self._pages.index.sharers(victim))
            slots += self._pages.leave_disk(victim)
            for row in sharers:
                # Where it stays in host memory, it is written again when it was used again.
                self._pages.mark_clean(row)
        return slots

    @property
    def futures(self) -> list[Future[list[int | None]]]:
        """Of all writes that have not been processed."""
        return self._writes.answers

    def give_up(self) -> None:
        """Process writes that have ended; the others will never be waited for."""
        self.settle()
        self._writes.abandon()

    def settle(self) -> None:
        """Process writes that have ended."""
        unneeded: list[int] = []
        for row, slot in self._writes.settled():
            if slot is None:
                self._pages.mark_dirty(row)
            else:
                unneeded += self._pages.settle_on_disk(row, slot)
        if unneeded:
            self._disk.remove(unneeded)

    def flush(self, timeout: float) -> int:
        """Write dirty pages for at most `timeout` seconds; returns the number not written."""
        deadline = time.monotonic() + timeout
        report = time.monotonic() + FLUSH_REPORT
        self.poll()
        while (self._writes or (self._pages.dirty.pages and self._disk.removing)) and time.monotonic() < deadline:
            time.sleep(0.005)
            self.poll()
            if time.monotonic() > report:
                report += FLUSH_REPORT
                left = self._pages.dirty.pages + self.rows_in_flight
                logger.info("CachedAttention: %d pages are still to be written to disk.", left)
        return self._pages.dirty.pages + self.rows_in_flight


def written(slots: list[int | None]) -> int:
    return len(slots) - slots.count(None)
