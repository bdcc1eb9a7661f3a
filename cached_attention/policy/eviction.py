"""The eviction order of a tier: first what no queued request needs, least worth first, tails before heads."""

from __future__ import annotations

import heapq
import math
from collections.abc import Iterable

from cached_attention.index import PageIndex, Residency
from cached_attention.policy.demand import Demand, WaitingOrder
from cached_attention.policy.next_use import BINS, BOUNDS, KINDS, NextUse, bin_of
from cached_attention.policy.set_aside import SetAside

NOT_WAITING = -1
"""Rank of work that comes before all queued requests: it may evict any page that they need."""
AGED_AT_ONCE = 1024
"""Maximum number of pages moved to the queue of another age at once; after a long pause the rest follow later."""


class EvictionOrder:
    """Unpinned leaves of one tier: first those that no queued request needs, in order of worth, least first; then
    those that are needed, from the request furthest from running.

    Only a page without successors in the tier can be evicted, so a chain shrinks from its tail and what stays is
    always a usable prefix. Using, pinning or wanting a page changes columns of the index and the demand, not this
    order: a stale entry is corrected when it reaches the front. Each page is queued at most once, so the order
    never outgrows the tier.

    Pages of the same class and age bin are alike (see `NextUse`), so there is one queue per class and bin, with
    the coldest page first, and a page moves to the queue of the next bin as it ages. Of queues of equal worth,
    the one with the coldest page comes first, so the order is LRU while nothing is known.

    Args:
        next_use: shared by the orders of all tiers; if it never learns of a use, the order is LRU.
    """

    def __init__(
        self,
        index: PageIndex,
        tier: Residency,
        waiting: WaitingOrder | None = None,
        next_use: NextUse | None = None,
    ) -> None:
        self._index = index
        self.tier = tier
        self._next_use = NextUse() if next_use is None else next_use
        self._queues: list[list[tuple[float, int]]] = [[] for _ in range(KINDS * BINS)]
        """Heaps of (last use, row), by class and bin."""
        self._fronts: list[tuple[float, float, int]] = []
        """Heap of (worth, last use of the first page, queue): the front of each queue, among stale entries."""
        self._queued = bytearray()
        self.spared: Residency | None = None
        """Pages that are also in this tier are evicted after all others that no request needs: not being on disk
        yet, they would be lost. They must be offered when they leave it."""
        self._set_aside = SetAside(index)
        """Pages that were spared when they reached the front."""
        self._seen = (-1, 0.0)
        self.demand = Demand(WaitingOrder() if waiting is None else waiting, index, tier, freed=self.offer)

    def has_queued(self, row: int) -> bool:
        """Whether the page will be considered for eviction; also true of some that cannot be evicted now."""
        return any(self._queued[row : row + 1]) or row in self._set_aside

    def offer(self, row: int) -> None:
        """`row` may have become evictable: placed, unpinned, no longer wanted, or its successor has left."""
        if row >= len(self._queued):
            self._queued.extend(bytes(row + 1 - len(self._queued)))
        if self.demand.is_wanted(row):
            self.demand.offer(row)
        elif not self._queued[row] and self._evictable(row):
            self._queued[row] = True
            last_use = self._index.last_use[row]
            number = self._index.kind[row] * BINS + bin_of(self._next_use.now - last_use)
            queue = self._queues[number]
            heapq.heappush(queue, (last_use, row))
            if queue[0][1] == row:
                self._announce(number)

    def offer_many(self, rows: Iterable[int]) -> None:
        """`offer` for each row; those with successors in the tier are skipped."""
        children = self.tier.children
        for row in rows:
            if not children[row]:
                self.offer(row)

    def _announce(self, number: int) -> None:
        """The queue has a new front."""
        if queue := self._queues[number]:
            worth = self._next_use.worth[number // BINS][number % BINS]
            heapq.heappush(self._fronts, (worth, queue[0][0], number))

    def take(self, used_before: float = math.inf, for_rank: int = NOT_WAITING) -> int | None:
        """The page to evict next, or None if no evictable page was last used before `used_before`.

        The caller must displace it. With `used_before` the coldest page comes first, whatever its worth.
        `for_rank`: rank of the request to make room for; pages needed at that rank or before it are not taken.
        """
        if used_before < math.inf:
            return self._coldest(used_before)
        row = self._unwanted()
        return self._wanted_behind(for_rank) if row is None else row

    def take_run(self, most: int, for_rank: int = NOT_WAITING) -> list[int]:
        """Up to `most` pages to evict next: a run of a chain, tail first.

        The same pages in the same order as from as many calls of `take`, in less time: once the tail of a chain
        is evicted, the page before it has the same worth and comes next.
        """
        if (row := self._unwanted()) is None:
            row = self._wanted_behind(for_rank)
            return [] if row is None else [row]
        index, children, wanted = self._index, self.tier.children, self.demand.is_wanted
        parents, last_uses, kinds, pins = index.parent, index.last_use, index.kind, index.pins
        kind, last_use = kinds[row], last_uses[row]
        oldest = self._next_use.now - BOUNDS[bin_of(self._next_use.now - last_use) + 1]
        run, spared = [row], self._is_spared(row)
        while len(run) < most and (row := parents[row]) in self.tier:
            alike = kinds[row] == kind and oldest < last_uses[row] <= last_use
            if not alike or children[row] > 1 or pins[row] or wanted(row) or self._is_spared(row) != spared:
                break
            run.append(row)
        return run

    def _unwanted(self) -> int | None:
        while (row := self._least_worth()) is not None:
            if not self._is_spared(row):
                return row
            self._set_aside.add(row)
        return self._set_aside.take_first(self._may_go)

    def _least_worth(self) -> int | None:
        if self._seen != (self._next_use.version, self._next_use.now):
            self._catch_up()
        while self._fronts:
            _, last_use, number = heapq.heappop(self._fronts)
            queue = self._queues[number]
            if queue and queue[0][0] == last_use:
                row = self._pop(number)
                self._announce(number)
                if row is not None:
                    return row
        return None

    def _catch_up(self) -> None:
        """Time has passed or estimates have changed: move pages that have aged, and reorder the queues."""
        self._seen = self._next_use.version, self._next_use.now
        left = AGED_AT_ONCE
        for number, queue in enumerate(self._queues):
            end = BOUNDS[number % BINS + 1]
            while left and queue and self._next_use.now - queue[0][0] >= end:
                row = heapq.heappop(queue)[1]
                self._queued[row] = False
                self.offer(row)
                left -= 1
        self._fronts = []
        for number in range(len(self._queues)):
            self._announce(number)

    def _coldest(self, used_before: float) -> int | None:
        if len(self._fronts) > 4 * len(self._queues):
            self._fronts, self._seen = [], (-1, 0.0)  # Most are stale: `_catch_up` makes them anew.
        while True:
            fronts = [(queue[0][0], number) for number, queue in enumerate(self._queues) if queue]
            last_use, number = min(fronts, default=(math.inf, -1))
            if last_use >= used_before:
                return self._set_aside.take_coldest(used_before, self._may_go)
            row = self._pop(number)
            self._announce(number)
            if row is not None:
                return row

    def _may_go(self, row: int) -> bool:
        """Whether a page that was set aside is to be evicted; if not, it is queued or will be offered again."""
        return not self._queued[row] and self._evictable(row) and not self.demand.is_wanted(row)

    def _pop(self, number: int) -> int | None:
        """Take the first page of a queue; None if its entry was stale."""
        last_use, row = heapq.heappop(self._queues[number])
        self._queued[row] = False
        if not self._evictable(row) or self.demand.is_wanted(row):
            return None  # It is offered again when that changes.
        if self._index.last_use[row] > last_use or self._index.kind[row] != number // BINS:
            self.offer(row)
            return None
        return row

    def _wanted_behind(self, rank: int) -> int | None:
        for row in self.demand.furthest():
            if self.demand.rank(row) <= rank:
                return None
            if self._evictable(row):
                return row
        return None

    def _is_spared(self, row: int) -> bool:
        return self.spared is not None and row in self.spared

    def _evictable(self, row: int) -> bool:
        return row in self.tier and not self.tier.children[row] and not self._index.pins[row]
