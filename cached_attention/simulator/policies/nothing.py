"""Computing everything again."""

from __future__ import annotations

from cached_attention.index import PageKey
from cached_attention.simulator.policies.base import LeafOrder


class KeepNothing(LeafOrder):
    """No page is kept: what the others are compared with."""

    def value(self, row: int) -> float:
        return 0.0

    def admits(self, key: PageKey) -> bool:
        return False
