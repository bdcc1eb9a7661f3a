"""Least frequently used."""

from __future__ import annotations

from cached_attention.simulator.policies.base import LeafOrder


class LeastFrequentlyUsed(LeafOrder):
    """By the number of uses while in the store, then by last use; counts never decay."""

    def value(self, row: int) -> tuple[int, float]:
        return self.index.uses[row], self.index.last_use[row]
