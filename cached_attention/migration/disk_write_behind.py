"""Write-behind from host memory to disk, coldest pages first, so that host slots can be freed without waiting."""

from __future__ import annotations

from cached_attention import admission
from cached_attention.hierarchy import Hierarchy
from cached_attention.migration.write_behind import WriteBehind
from cached_attention.stats import Reason
from cached_attention.tiers.sources import PageDisk

BATCH_PAGES = 32
"""Pages per write; the disk tier merges neighbours and commits once per batch."""
BATCHES_IN_FLIGHT = 2
RESERVE = 0.1
"""Share of the host slots that should be free or clean; below it, writes no longer yield to reads."""
URGENT_BATCHES = 8
"""Batches in flight while the reserve is short; at most so many if the disk runs dry between passes."""
SHARE = 0.1
"""Share of the host slots that non-urgent writes may hold: their pages cannot be evicted."""


class DiskWriteBehind(WriteBehind):
    """Copies dirty pages to disk.

    Every dirty page is written sooner or later, so that a crash loses little. Writes yield to reads, until so
    many host slots are dirty that freeing one might lose a page.

    Args:
        min_uses: write a page after this many uses; spares the disk pages that are never reused.
    """

    name = "disk"

    def __init__(self, pages: Hierarchy, disk: PageDisk, min_uses: int) -> None:
        super().__init__(pages, disk)
        self._disk = disk
        self._min_uses = min_uses
        self._depth = BATCHES_IN_FLIGHT
        share = int(SHARE * pages.host.capacity) // BATCH_PAGES
        self._deepest = min(URGENT_BATCHES, max(BATCHES_IN_FLIGHT, share))

    def reserve_is_short(self, held: int = 0) -> bool:
        """Whether fewer host slots than the reserve are free or clean, not counting those of `held` pages."""
        return self.left + held > (1 - RESERVE) * self._pages.host.capacity

    def poll(self, reading: bool = False, held: int = 0) -> None:
        """Process writes that have ended, and start more.

        `reading`: whether reads need the disk. `held`: pages that queued requests keep in host memory.
        """
        self._adapt_depth()
        urgent = self.reserve_is_short(held)
        batches = URGENT_BATCHES if urgent else 0 if reading else self._depth
        while len(self._batches) < batches and self._disk.healthy and (rows := self._choose(batches)):
            rows.reverse()  # The head of a chain first: pages lie on disk in the order in which they are read.
            self._write(rows)

    def _adapt_depth(self) -> None:
        """Enough batches in flight to keep the disk busy until the next pass."""
        was_writing = bool(self._batches)
        self.settle()
        if self._batches:
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
        last_use = self._pages.index.last_use[row]
        slots = admission.evict_from_disk(self._pages, most - removing, last_use, Reason.ROOM)
        if slots:
            self._disk.remove(slots)
        return bool(slots or removing)

    def _written(self, row: int, slot: int | None) -> None:
        if slot is None:
            self._pages.mark_dirty(row)
        elif unneeded := self._pages.settle_on_disk(row, slot):
            self._disk.remove(unneeded)

    @property
    def left(self) -> int:
        return self._pages.dirty.pages + self.rows_in_flight

    @property
    def _goes_on(self) -> bool:
        return bool(self._batches or (self._pages.dirty.pages and self._disk.removing))
