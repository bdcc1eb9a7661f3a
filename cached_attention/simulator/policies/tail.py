"""Tail-optimised LRU."""

from __future__ import annotations

from cached_attention.index import NOWHERE, PageIndex, PageKey, Residency
from cached_attention.policy.demand import WaitingOrder
from cached_attention.simulator.policies.base import LeafOrder

COMPUTED = 2048
"""Tokens of a prompt that can be computed within the TTFT target."""
EXPECTED = 512
"""Tokens that the next prompt is expected to add."""


class TailOptimisedLru(LeafOrder):
    """Evicts pages at the end of a conversation first if they can be recomputed within the target, then LRU.

    For a conversation of L tokens it is enough to keep L + `EXPECTED` - `COMPUTED`: Zhang et al.,
    arXiv:2510.15152.
    """

    def __init__(self, index: PageIndex, tier: Residency, waiting: WaitingOrder, capacity: int) -> None:
        super().__init__(index, tier, waiting, capacity)
        self._reach: dict[PageKey, int] = {}
        """Per page in the tier: position of the last page that ever followed it, in tokens."""

    def placed(self, row: int) -> None:
        reach = self.index.position[row]
        while row != NOWHERE and self._reach.get(self.index.key(row), -1) < reach:
            self._reach[self.index.key(row)] = reach
            row = self.index.parent[row]

    def removed(self, row: int) -> None:
        self._reach.pop(self.index.key(row), None)

    def value(self, row: int) -> tuple[bool, float]:
        enough = self._reach[self.index.key(row)] + EXPECTED - COMPUTED
        return self.index.position[row] <= enough, self.index.last_use[row]
