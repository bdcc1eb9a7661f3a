"""What clients said of conversations whose next turn has not arrived."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from cached_attention.index import PageKey

GRACE = 60.0
"""Seconds beyond its time that an expected turn is waited for."""
MOST_HINTS = 1024
"""Of which the last to be due give way to new ones."""
_PREFIX = "hint "


class Hint(NamedTuple):
    due: float
    """When the next turn is expected, in seconds since the epoch."""
    until: float
    """When the hint is no longer good."""


class Hints:
    """Hints by the name under which the conversation waits for its turn, behind all real requests."""

    def __init__(self) -> None:
        self._hints: dict[str, Hint] = {}
        self._order: list[str] = []

    def __len__(self) -> int:
        return len(self._hints)

    def __contains__(self, name: str) -> bool:
        return name in self._hints

    @staticmethod
    def name(last: PageKey) -> str:
        """Of the hint for the chain that ends with `last`; no request is called so."""
        return f"{_PREFIX}{last.hex()}"

    @staticmethod
    def is_name(request: str) -> bool:
        """Whether `request` stands for a hint."""
        return request.startswith(_PREFIX)

    def order(self) -> Sequence[str]:
        """Names, the first to be due first."""
        return self._order

    def add(self, name: str, hint: Hint) -> list[str]:
        """Replaces what was said before; returns names that give way."""
        self._hints[name] = hint
        self._sort()
        return [self.discard(last) for last in self._order[MOST_HINTS:]]

    def discard(self, name: str) -> str:
        if self._hints.pop(name, None) is not None:
            self._sort()
        return name

    def expire(self, now: float) -> list[str]:
        """Removes and returns the names of hints that are no longer good."""
        over = [name for name, hint in self._hints.items() if hint.until < now]
        for name in over:
            del self._hints[name]
        if over:
            self._sort()
        return over

    def _sort(self) -> None:
        self._order = sorted(self._hints, key=lambda name: self._hints[name].due)
