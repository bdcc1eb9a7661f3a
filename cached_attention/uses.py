"""When pages were used last, and how often."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from cached_attention.hierarchy import Hierarchy
from cached_attention.index import NOWHERE
from cached_attention.tiers.disk import DiskTier

USE_NOTED = 60.0
"""Seconds by which a page's last use may lag behind that of its successors, in memory and on disk."""


class Uses:
    """Records uses in the index, and on disk for pages that are there.

    Args:
        min_uses: write a page to disk after this many uses.
        clock: seconds since the epoch.
    """

    def __init__(
        self, pages: Hierarchy, disk: DiskTier | None, min_uses: int, clock: Callable[[], float]
    ) -> None:
        self._pages = pages
        self._index = pages.index
        self._disk = disk
        self._min_uses = min_uses
        self._clock = clock

    def mark(self, row: int) -> None:
        """`row` is in use now, and so are the pages before it.

        The walk ends at the first page that another one passed recently: a chain is walked once per `USE_NOTED`.
        """
        last_use, parent, walked = self._index.last_use, self._index.parent, self._index.walked
        now = self._clock()
        last_use[row] = now
        while row != NOWHERE and walked[row] <= now - USE_NOTED:
            walked[row], last_use[row] = int(now), now
            self._touch(row, now)
            self._pages.mark_dirty(row)  # If the disk has evicted it: on disk its successors need it.
            row = parent[row]

    def count(self, rows: Sequence[int]) -> None:
        """`rows`, consecutive pages of a chain, are being loaded."""
        now = self._clock()
        for row in rows:
            self._index.uses[row] += 1
            self._index.last_use[row] = now
            self._pages.mark_dirty(row)
            self._touch(row, now)
        self._raise_before(rows[0])

    def _touch(self, row: int, now: float) -> None:
        if self._disk is not None and (slot := self._pages.on_disk.slot[row]) != NOWHERE:
            self._disk.touch(slot, now, self._index.uses[row])

    def _raise_before(self, row: int) -> None:
        """Raise the uses of pages before `row` that the device still had: on disk `row` needs them."""
        parent, uses = self._index.parent, self._index.uses
        least = min(uses[row], self._min_uses)
        while (row := parent[row]) != NOWHERE and uses[row] < least:
            uses[row] = least
            self._pages.mark_dirty(row)
