"""What clients say about the future of conversations, and what the store does about it."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from cached_attention.chain import Chain
from cached_attention.drops import DROPPING, Drop, Drops
from cached_attention.hierarchy import Hierarchy
from cached_attention.hints import GRACE, Hint, Hints
from cached_attention.index import NOWHERE, PageKey

HINTED_AT_ONCE = 8
"""Hints per poll that are looked up again."""
KEPT = 3600.0
"""Seconds that the hint `keep` lasts if there is no time to live."""


class Outlooks:
    """Conversations that go on soon, are kept, or are over.

    Args:
        arrive: queues a conversation, under the name of its hint, behind all requests; returns how many of its
            pages are in some tier.
        leave: takes it out of the queue.
        remove: removes pages from every tier, except those in use; returns how many.
        clock: seconds since the epoch.
        kept: seconds that the hint `keep` lasts; `KEPT` if None.
    """

    def __init__(
        self,
        pages: Hierarchy,
        arrive: Callable[[str, Chain], int],
        leave: Callable[[str], None],
        remove: Callable[[Sequence[PageKey]], int],
        clock: Callable[[], float],
        kept: float | None,
    ) -> None:
        self._pages = pages
        self._arrive = arrive
        self._leave = leave
        self._remove = remove
        self._clock = clock
        self._kept = kept or KEPT
        self._hints = Hints()
        self._drops = Drops()

    @property
    def queued(self) -> Sequence[str]:
        """Names under which conversations are queued, in the order in which they are due."""
        return self._hints.order()

    def expect(self, chain: Chain, seconds: float) -> int:
        """See `CachedAttentionStore.expect`."""
        due = self._clock() + seconds
        return self._hint(chain, Hint(due, due + GRACE))

    def keep(self, chain: Chain) -> int:
        """See `CachedAttentionStore.keep`."""
        until = self._clock() + self._kept
        return self._hint(chain, Hint(until, until))

    def _hint(self, chain: Chain, hint: Hint) -> int:
        if not chain.keys:
            return 0
        name = Hints.name(chain.keys[-1])
        for given_up in self._hints.add(name, hint):
            self._leave(given_up)
        return self._look_up(name, chain) if name in self._hints else 0

    def _look_up(self, name: str, chain: Chain) -> int:
        pages = self._arrive(name, chain)
        if pages < len(chain.keys):
            self._hints.lack(name, chain)
        return pages

    def loaded(self, keys: Sequence[PageKey]) -> None:
        """The pages `keys` are being loaded: if a turn was expected after one of them, it has come."""
        if self._hints:
            for name in filter(self._hints.is_expected, map(Hints.name, keys)):
                self._leave(self._hints.discard(name))

    def drop(self, chain: Chain) -> int:
        """See `CachedAttentionStore.drop`."""
        if not chain.keys:
            return 0
        self._leave(self._hints.discard(Hints.name(chain.keys[-1])))
        return self._try(Drop(chain.keys, self._clock() + DROPPING))

    def _try(self, drop: Drop) -> int:
        removed, index = self._remove(drop.keys), self._pages.index
        if any(row != NOWHERE and index.pins[row] for row in map(index.find, drop.keys)):
            self._drops.add(drop, self._clock())
        return removed

    def poll(self, has_saved: bool) -> None:
        """Let hints expire and try again what could not be done; `has_saved`: saves have ended."""
        if self._hints:
            for name in self._hints.expire(self._clock()):
                self._leave(name)
            # A hint often comes right after an answer, whose pages are still being saved.
            for name, chain in self._hints.take_lacking(HINTED_AT_ONCE) if has_saved else ():
                self._look_up(name, chain)
        for drop in self._drops.take_due(self._clock()):
            self._try(drop)
