"""Recomputes everything."""

from __future__ import annotations

from cached_attention.index import PageKey
from cached_attention.simulator.policies.base import LeafOrder


class KeepNothing(LeafOrder):
    """Keeps no page: the baseline for all others."""

    def value(self, row: int) -> float:
        return 0.0

    def admits(self, key: PageKey) -> bool:
        return False
