"""Which conversations are continued most. Knows only page keys and counts, no text."""

from __future__ import annotations

import secrets
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import xxhash

from cached_attention.index import PageKey

REMEMBERED = 4_096
"""Maximum number of conversations; those whose last turn ended longest ago are forgotten."""


@dataclass
class _Conversation:
    turns: int = 0
    reused_tokens: int = 0
    pages: int = 0
    last_turn: float = 0.0


class Conversation(NamedTuple):
    """What is known about one conversation."""

    name: str
    """Hash of its last page's key with a secret of this process, so that nobody can check a guess of the text."""
    last: PageKey
    turns: int
    pages: int
    reused_tokens: int
    """Over all turns."""
    idle: float
    """Seconds since its last turn ended."""


class Conversations:
    """Recognises a turn by the last page of the previous turn, which is one of its own pages.

    Args:
        clock: seconds.
    """

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._secret = secrets.randbits(64)
        self._by_end: OrderedDict[PageKey, _Conversation] = OrderedDict()

    def __len__(self) -> int:
        return len(self._by_end)

    def turn_ended(self, keys: Sequence[PageKey], reused_tokens: int) -> None:
        """A turn has ended; its conversation now has the pages `keys`."""
        if not keys:
            return
        before = next((key for key in reversed(keys) if key in self._by_end), None)
        known = _Conversation() if before is None else self._by_end.pop(before)
        known.turns += 1
        known.reused_tokens += reused_tokens
        known.pages = len(keys)
        known.last_turn = self._clock()
        self._by_end[keys[-1]] = known
        if len(self._by_end) > REMEMBERED:
            self._by_end.popitem(last=False)

    def hottest(self, count: int) -> list[Conversation]:
        """The `count` conversations with the most turns; ties are broken by the latest turn."""
        ranked = sorted(self._by_end.items(), key=lambda item: (item[1].turns, item[1].last_turn), reverse=True)
        now = self._clock()
        return [
            Conversation(
                xxhash.xxh3_64_hexdigest(key, self._secret),
                key,
                known.turns,
                known.pages,
                known.reused_tokens,
                now - known.last_turn,
            )
            for key, known in ranked[:count]
        ]
