"""The order in which pages leave a tier: coldest first, the tail of a chain before its head."""

from __future__ import annotations

import heapq
import math

from cached_attention.index import PageIndex, Residency


class EvictionOrder:
    """Coldest unpinned leaves of one tier.

    Only a page that no page of the tier follows may go, so a chain shrinks from its tail and what
    stays is always a usable prefix. Touching or pinning a page changes columns of the index, not
    this order: an entry that is out of date is put right when it reaches the front. Each page is
    queued at most once, so the order never outgrows the tier.
    """

    def __init__(self, index: PageIndex, tier: Residency) -> None:
        self._index = index
        self._tier = tier
        self._heap: list[tuple[float, int]] = []
        self._queued = bytearray()

    def offer(self, row: int) -> None:
        """Say that `row` may have become evictable: placed, unpinned, or left by the page after it."""
        if row >= len(self._queued):
            self._queued.extend(bytes(row + 1 - len(self._queued)))
        if not self._queued[row] and self._evictable(row):
            self._queued[row] = True
            heapq.heappush(self._heap, (self._index.last_use[row], row))

    def take(self, used_before: float = math.inf) -> int | None:
        """The page to evict next, or None when nothing evictable was last used before `used_before`.

        The caller displaces it.
        """
        while self._heap:
            last_use, row = heapq.heappop(self._heap)
            self._queued[row] = False
            if not self._evictable(row):
                continue
            if self._index.last_use[row] > last_use:
                self.offer(row)
                continue
            if self._index.last_use[row] >= used_before:
                self.offer(row)
                return None
            return row
        return None

    def _evictable(self, row: int) -> bool:
        return row in self._tier and not self._tier.children[row] and not self._index.pins[row]
