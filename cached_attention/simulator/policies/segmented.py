"""Segmented LRU."""

from __future__ import annotations

from collections import OrderedDict

from cached_attention.index import NOWHERE, PageIndex, PageKey, Residency
from cached_attention.policy.demand import WaitingOrder
from cached_attention.simulator.policies.base import LeafOrder

PROTECTED = 0.8
"""Share of the tier that pages used more than once may hold."""


class SegmentedLru(LeafOrder):
    """Pages used again are protected; when they exceed their share of the tier, the coldest loses its protection.

    Karedla, Love and Wherry, "Caching strategies to improve disk system performance", IEEE Computer 27 (3), 1994.
    """

    def __init__(self, index: PageIndex, tier: Residency, waiting: WaitingOrder, capacity: int) -> None:
        super().__init__(index, tier, waiting, capacity)
        self._protected: OrderedDict[PageKey, None] = OrderedDict()

    def value(self, row: int) -> tuple[bool, float]:
        return self.index.key(row) in self._protected, self.index.last_use[row]

    def used(self, row: int) -> None:
        self._protected[self.index.key(row)] = None
        self._protected.move_to_end(self.index.key(row))
        while len(self._protected) > PROTECTED * self.capacity:
            key, _ = self._protected.popitem(last=False)
            if (demoted := self.index.find(key)) != NOWHERE:
                self.offer(demoted)

    def removed(self, row: int) -> None:
        self._protected.pop(self.index.key(row), None)
