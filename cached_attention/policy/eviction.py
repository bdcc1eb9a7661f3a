"""The order in which pages leave a tier: unwanted and coldest first, the tail of a chain before its head."""

from __future__ import annotations

import heapq
import math

from cached_attention.index import PageIndex, Residency
from cached_attention.policy.demand import Demand, WaitingOrder

NOT_WAITING = -1
"""Rank of what goes before all that waits: it may push out any page that a waiting request wants."""


class EvictionOrder:
    """Unpinned leaves of one tier: first what no waiting request wants, the coldest of them before others,
    then what is wanted, from the request that is furthest from running.

    Only a page that no page of the tier follows may go, so a chain shrinks from its tail and what
    stays is always a usable prefix. Touching, pinning or wanting a page changes columns of the index and
    the demand, not this order: an entry that is out of date is put right when it reaches the front. Each
    page is queued at most once, so the order never outgrows the tier.
    """

    def __init__(self, index: PageIndex, tier: Residency, waiting: WaitingOrder | None = None) -> None:
        self._index = index
        self.tier = tier
        self._heap: list[tuple[float, int]] = []
        self._queued = bytearray()
        self.demand = Demand(WaitingOrder() if waiting is None else waiting, index, tier, freed=self.offer)

    def offer(self, row: int) -> None:
        """Say that `row` may have become evictable: placed, unpinned, unwanted, or left by the page after it."""
        if row >= len(self._queued):
            self._queued.extend(bytes(row + 1 - len(self._queued)))
        if self.demand.is_wanted(row):
            self.demand.offer(row)
        elif not self._queued[row] and self._evictable(row):
            self._queued[row] = True
            heapq.heappush(self._heap, (self._index.last_use[row], row))

    def take(self, used_before: float = math.inf, for_rank: int = NOT_WAITING) -> int | None:
        """The page to evict next, or None when nothing evictable was last used before `used_before`.

        The caller displaces it. `for_rank`: who takes waits at this rank, and gets no page that is
        wanted at that rank or before it.
        """
        row = self._coldest_unwanted(used_before)
        if row is None and used_before == math.inf:
            row = self._wanted_behind(for_rank)
        return row

    def _coldest_unwanted(self, used_before: float) -> int | None:
        while self._heap:
            last_use, row = heapq.heappop(self._heap)
            self._queued[row] = False
            if not self._evictable(row) or self.demand.is_wanted(row):
                continue  # It is offered again when that ends.
            if self._index.last_use[row] > last_use:
                self.offer(row)
                continue
            if self._index.last_use[row] >= used_before:
                self.offer(row)
                return None
            return row
        return None

    def _wanted_behind(self, rank: int) -> int | None:
        for row in self.demand.furthest():
            if self.demand.rank(row) <= rank:
                return None
            if self._evictable(row):
                return row
        return None

    def _evictable(self, row: int) -> bool:
        return row in self.tier and not self.tier.children[row] and not self._index.pins[row]
