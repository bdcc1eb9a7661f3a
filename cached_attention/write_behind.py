"""Pages on their way from host memory to disk, coldest first, so that a host slot can be had without waiting."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable

from cached_attention.hierarchy import Hierarchy
from cached_attention.in_flight import InFlight
from cached_attention.index import NOWHERE
from cached_attention.stats import Direction, Reason
from cached_attention.tiers.disk_pages import PageWrite
from cached_attention.tiers.page_disk import PageDisk

logger = logging.getLogger(__name__)

BATCH_PAGES = 32
"""Pages per write; the disk tier merges neighbours and commits once per batch."""
BATCHES_IN_FLIGHT = 2
RESERVE = 0.1
"""Part of the host slots that is to be free or clean; below it, writes no longer wait for slack."""
URGENT_BATCHES = 8
"""In flight while the reserve is short, and at most if passes are so long that the disk runs dry in between."""
SHARE = 0.1
"""Part of the host slots that writes may hold where they are not urgent: such pages cannot be evicted."""
ROOM_PAUSE = 0.5
"""Seconds before more room is made on a full disk: slots come free once their removal is durable."""
FLUSH_REPORT = 2.0
"""Seconds between log lines of a long flush."""


def page_write(pages: Hierarchy, row: int) -> PageWrite:
    """The record of `row`, which is in host memory, under the key that it was saved under."""
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

    All that is dirty is written sooner or later, so that a crash loses little. Writes use what reads leave
    of the device, until so many host slots are dirty that a slot might not be had without losing a page.

    Args:
        min_uses: a page is written once it was used this often; saves the disk what is never asked for.
    """

    def __init__(self, pages: Hierarchy, disk: PageDisk, min_uses: int, clock: Callable[[], float]) -> None:
        self._pages = pages
        self._disk = disk
        self._min_uses = min_uses
        self._clock = clock
        self._writes = InFlight(pages)
        self._depth = BATCHES_IN_FLIGHT
        share = int(SHARE * pages.host.capacity) // BATCH_PAGES
        self._deepest = min(URGENT_BATCHES, max(BATCHES_IN_FLIGHT, share))
        self._make_room_at = 0.0

    @property
    def rows_in_flight(self) -> int:
        return self._writes.rows

    def reserve_is_short(self, held: int = 0) -> bool:
        """Whether fewer host slots than the reserve are free or clean, those of `held` pages left out."""
        taken = self._pages.dirty.pages + self.rows_in_flight + held
        return taken > (1 - RESERVE) * self._pages.host.capacity

    def poll(self, reading: bool = False, held: int = 0) -> None:
        """Take note of what was written, and write more.

        `reading`: the disk is wanted for reads. `held`: pages that waiting requests keep in host memory.
        """
        self._adapt_depth()
        urgent = self.reserve_is_short(held)
        batches = URGENT_BATCHES if urgent else 0 if reading else self._depth
        while len(self._writes) < batches and self._disk.healthy:
            if not (rows := self._choose()):
                break
            rows.reverse()  # The head of a chain first: neighbours on disk in the order in which they are read.
            future = self._disk.write([page_write(self._pages, row) for row in rows])
            self._pages.stats.watch(Direction.DEMOTE, "disk", future, written)
            self._writes.add(rows, future)

    def _adapt_depth(self) -> None:
        """Enough batches in flight to keep the disk busy until the next pass."""
        was_writing = len(self._writes) > 0
        self._settle()
        if len(self._writes):
            self._depth = max(BATCHES_IN_FLIGHT, self._depth - 1)
        elif was_writing:
            self._depth = min(2 * self._depth, self._deepest)

    def _choose(self) -> list[int]:
        rows: list[int] = []
        most = min(BATCH_PAGES, self._disk.write_room)
        while len(rows) < most and (row := self._pages.dirty_order.take()) is not None:
            if self._disk.free_slots <= len(rows) and (rows or self._make_room(row)):
                self._pages.offer(row)
                break
            self._pages.mark_clean(row)
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
            self._pages.stats.left("disk", Reason.ROOM, len(slots))
            self._disk.remove(slots)
        return True

    def evict(self, count: int, limit: float) -> list[int]:
        """Disk slots of up to `count` pages last used before `limit`; they are in the tier no more."""
        slots: list[int] = []
        while len(slots) < count and (victim := self._pages.disk_order.take(limit)) is not None:
            slots += self._pages.leave_disk(victim)
        return slots

    def _settle(self, wait: bool = False) -> None:
        unneeded: list[int] = []
        for row, slot in self._writes.settled(wait):
            if slot is None:
                self._pages.mark_dirty(row)
            else:
                unneeded += self._pages.settle_on_disk(row, slot)
        if unneeded:
            self._disk.remove(unneeded)

    def wait(self) -> None:
        """Until the disk touches no page of the arena."""
        self._settle(wait=True)

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


def written(slots: list[int | None]) -> int:
    return len(slots) - slots.count(None)
