"""Clients' hints about conversations whose next turn has not arrived yet."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import islice
from typing import NamedTuple

from cached_attention.chain import Chain
from cached_attention.index import PageKey

GRACE = 60.0
"""Seconds that an expected turn may be late before its hint expires."""
MOST_HINTS = 1024
"""Maximum number of hints; beyond it, those that are due last are dropped."""
_PREFIX = "hint "


class Hint(NamedTuple):
    due: float
    """When the next turn is expected, in seconds since the epoch."""
    until: float
    """When the hint expires, in seconds since the epoch."""


class Hints:
    """Hints by the name under which the conversation is queued, behind all real requests."""

    def __init__(self) -> None:
        self._hints: dict[str, Hint] = {}
        self._order: list[str] = []
        self._lacking: dict[str, Chain] = {}

    def __len__(self) -> int:
        return len(self._hints)

    def __contains__(self, name: str) -> bool:
        return name in self._hints

    def is_expected(self, name: str) -> bool:
        """Whether a hint of this name says when the next turn comes; others hold beyond it."""
        hint = self._hints.get(name)
        return hint is not None and hint.due < hint.until

    @staticmethod
    def name(last: PageKey) -> str:
        """Name of the hint for the chain that ends with `last`; no request has such a name."""
        return f"{_PREFIX}{last.hex()}"

    @staticmethod
    def is_name(request: str) -> bool:
        """Whether `request` stands for a hint."""
        return request.startswith(_PREFIX)

    def order(self) -> Sequence[str]:
        """Names of the hints, earliest due first."""
        return self._order

    def add(self, name: str, hint: Hint) -> list[str]:
        """Add a hint, or replace an earlier one; returns the names of hints dropped to make room."""
        self._hints[name] = hint
        self._sort()
        return [self.discard(last) for last in self._order[MOST_HINTS:]]

    def lack(self, name: str, chain: Chain) -> None:
        """Some pages of the hinted conversation `chain` are in no tier, perhaps not yet."""
        self._lacking[name] = chain

    def take_lacking(self, most: int) -> list[tuple[str, Chain]]:
        """Up to `most` hints that lacked pages, for another lookup; the oldest first."""
        names = list(islice(self._lacking, most))
        return [(name, self._lacking.pop(name)) for name in names]

    def discard(self, name: str) -> str:
        self._lacking.pop(name, None)
        if self._hints.pop(name, None) is not None:
            self._sort()
        return name

    def expire(self, now: float) -> list[str]:
        """Remove hints that have expired; returns their names."""
        over = [name for name, hint in self._hints.items() if hint.until < now]
        for name in over:
            del self._hints[name]
            self._lacking.pop(name, None)
        if over:
            self._sort()
        return over

    def _sort(self) -> None:
        self._order = sorted(self._hints, key=lambda name: self._hints[name].due)
