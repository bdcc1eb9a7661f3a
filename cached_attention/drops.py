"""Conversations that clients have dropped while some of their pages were on their way between tiers."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from cached_attention.index import PageKey

DROPPING = 5.0
"""Seconds for which dropping such pages is tried again."""
PAUSE = 0.05
"""Seconds between two tries."""


class Drop(NamedTuple):
    keys: Sequence[PageKey]
    """The conversation's chain."""
    until: float
    """When to give up, in seconds since the epoch."""


class Drops:
    """What to try again, and when."""

    def __init__(self) -> None:
        self._waiting: deque[tuple[float, Drop]] = deque()

    def add(self, drop: Drop, now: float) -> None:
        """Some pages of `drop` could not be removed yet."""
        self._waiting.append((now + PAUSE, drop))

    def take_due(self, now: float) -> Iterator[Drop]:
        """What to try again now, the oldest first; each is to be added again if it still fails."""
        while self._waiting and self._waiting[0][0] <= now:
            _, drop = self._waiting.popleft()
            if now < drop.until:
                yield drop
