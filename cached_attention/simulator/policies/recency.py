"""Orders by the time of the last use."""

from __future__ import annotations

from cached_attention.simulator.policies.base import LeafOrder


class LeastRecentlyUsed(LeafOrder):
    def value(self, row: int) -> float:
        return self.index.last_use[row]
