"""First in, first out."""

from __future__ import annotations

from cached_attention.index import NOWHERE, PageIndex, PageKey, Residency
from cached_attention.policy.demand import WaitingOrder
from cached_attention.simulator.policies.base import LeafOrder


class FirstInFirstOut(LeafOrder):
    """By the time at which the page entered the tier."""

    def __init__(self, index: PageIndex, tier: Residency, waiting: WaitingOrder, capacity: int) -> None:
        super().__init__(index, tier, waiting, capacity)
        self.entered: dict[PageKey, int] = {}
        self._arrivals = 0

    def placed(self, row: int) -> None:
        key = self.index.key(row)
        if key not in self.entered:
            self._arrivals += 1
            self.entered[key] = self._arrivals

    def removed(self, row: int) -> None:
        self.entered.pop(self.index.key(row), None)

    def value(self, row: int) -> int:
        return self.entered[self.index.key(row)]


class ConversationsFirstInFirstOut(FirstInFirstOut):
    """By the time at which the chain's first page entered: evicts whole conversations, as in the paper."""

    def value(self, row: int) -> int:
        while (parent := self.index.parent[row]) != NOWHERE:
            row = parent
        return self.entered.get(self.index.key(row), 0)
