"""S3-FIFO."""

from __future__ import annotations

from collections import OrderedDict

from cached_attention.index import PageIndex, PageKey, Residency
from cached_attention.policy.demand import WaitingOrder
from cached_attention.simulator.policies.base import LeafOrder
from cached_attention.simulator.policies.leaves import Leaves

SMALL = 0.1
"""Share of the tier for pages on probation."""
MOST_USES = 3


class S3Fifo(LeafOrder):
    """Three queues: new pages on probation, the main queue, and the keys of pages that failed probation (ghosts).

    A page that is used on probation, or returns while its key is a ghost, moves to the main queue, where each use
    spares it once. Yang et al., "FIFO queues are all you need for cache eviction", SOSP 2023. Here only leaves
    are evicted from the queues.
    """

    def __init__(self, index: PageIndex, tier: Residency, waiting: WaitingOrder, capacity: int) -> None:
        super().__init__(index, tier, waiting, capacity)
        self._small: dict[PageKey, int] = {}
        self._main: dict[PageKey, int] = {}
        """Both: when the page entered the queue."""
        self._uses: dict[PageKey, int] = {}
        self._ghosts: OrderedDict[PageKey, None] = OrderedDict()
        self._moves = 0
        self._small_leaves = Leaves(lambda row: self._evictable(row) and self._is_new(row), self.value)
        self._main_leaves = Leaves(self._evictable, self.value)

    def value(self, row: int) -> int:
        key = self.index.key(row)
        return self._small[key] if key in self._small else self._main[key]

    def placed(self, row: int) -> None:
        key = self.index.key(row)
        if key not in self._small and key not in self._main:
            self._uses[key] = 0
            self._enter(self._main if key in self._ghosts else self._small, key)
            self._ghosts.pop(key, None)

    def _enter(self, queue: dict[PageKey, int], key: PageKey) -> None:
        self._moves += 1
        queue[key] = self._moves

    def used(self, row: int) -> None:
        key = self.index.key(row)
        self._uses[key] = min(MOST_USES, self._uses.get(key, 0) + 1)

    def removed(self, row: int) -> None:
        key = self.index.key(row)
        if self._small.pop(key, None) is not None:
            self._ghosts[key] = None
            if len(self._ghosts) > self.capacity:
                self._ghosts.popitem(last=False)
        self._main.pop(key, None)
        self._uses.pop(key, None)

    def leaves_of(self, row: int) -> Leaves:
        return self._small_leaves if self._is_new(row) else self._main_leaves

    def _is_new(self, row: int) -> bool:
        return self.index.key(row) in self._small

    def next_leaves(self) -> Leaves:
        """Spares used pages until an unused one is at the front of its queue."""
        while True:
            small, main = self._small_leaves.front(), self._main_leaves.front()
            from_small = small is not None and (len(self._small) > SMALL * self.capacity or main is None)
            row = small if from_small else main
            if row is None or not self._uses[self.index.key(row)]:
                return self._small_leaves if from_small else self._main_leaves
            self._spare(row)

    def _spare(self, row: int) -> None:
        key = self.index.key(row)
        leaves = self.leaves_of(row)
        leaves.pop()
        self._uses[key] = 0 if self._small.pop(key, None) is not None else self._uses[key] - 1
        self._enter(self._main, key)
        self._main_leaves.offer(row)
