"""Which pages are usable in which tier; reports changes to an observer."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, NamedTuple, Protocol

from cached_attention.index import NOWHERE, PageKey, Residency

if TYPE_CHECKING:
    from cached_attention.hierarchy import Hierarchy


class ResidentPage(NamedTuple):
    """A page that is usable in a tier."""

    tier: str
    key: PageKey
    parent: PageKey | None
    """Key of the page before it; None at the start of a prompt, or if unknown."""


class ResidencyObserver(Protocol):
    """Called on the thread that calls the store, in the middle of its work; must not call the store."""

    def entered(self, page: ResidentPage) -> None:
        """All bytes of the page have arrived in the tier. An alias is a page of its own.

        For the remote tier: this server has put the page there, or has found it there.
        """

    def left(self, tier: str, key: PageKey) -> None:
        """A page that had entered the tier has left it: evicted, expired, dropped or lost.

        For the remote tier: this server no longer knows whether the page is there.
        """

    def cleared(self) -> None:
        """All tiers are empty, except for pages adopted from a disk just opened: see `ResidencyFeed.walk`."""


class ResidencyFeed:
    """Reports the pages of the store's present hierarchy to `observer`, if there is one."""

    observer: ResidencyObserver | None = None
    adopted = 0
    """The pages that the disk held when it was opened are in the rows before this one."""

    def follow(self, pages: Hierarchy) -> None:
        """`pages` is the store's hierarchy from now on; pages that it adopts are not reported, see `walk`."""
        self._pages, self.adopted = pages, 0
        self._tiers = [tier for tier in pages.index.tiers if tier is not pages.dirty]
        if self.observer is not None:
            self.observer.cleared()

    def entered(self, row: int, tier: Residency) -> None:
        if self.observer is not None and self._is_usable(row, tier):
            self.observer.entered(self._page(row, tier))

    def leaves(self, row: int, tier: Residency) -> None:
        """Must be called before the page has left."""
        if self.observer is not None and tier in self._tiers and self._is_usable(row, tier):
            self.observer.left(tier.name, self._pages.index.key(row))

    def entered_page(self, page: ResidentPage) -> None:
        """`entered` for a tier whose pages have no row."""
        if self.observer is not None:
            self.observer.entered(page)

    def left_page(self, tier: str, key: PageKey) -> None:
        if self.observer is not None:
            self.observer.left(tier, key)

    def tiers_of(self, key: PageKey) -> list[ResidentPage]:
        """The page in each of its tiers, as far as the observer was told."""
        row, remote = self._pages.index.find(key), self._pages.remote.told(key)
        own = [self._page(row, tier) for tier in self._tiers if row != NOWHERE and self._is_usable(row, tier)]
        return own if remote is None else [*own, remote]

    def is_known(self, key: PageKey) -> bool:
        """Whether the page is in a tier, or has a row in the index for another reason, see `PageIndex`."""
        return self._pages.index.find(key) != NOWHERE or self._pages.remote.told(key) is not None

    def walk(self, first: int, count: int) -> Iterator[ResidentPage]:
        """The usable pages at `count` places from `first` on; nothing may change meanwhile. Places end at `end`.

        A place is a row of the index or, after those, a place of the remote tier.
        """
        keys, remote = self._pages.index.keys, self._pages.remote
        for row in range(first, min(first + count, len(keys))):
            if keys[row] is not None:
                yield from (self._page(row, tier) for tier in self._tiers if self._is_usable(row, tier))
        if (rest := first + count - len(keys)) > 0:
            yield from remote.walk(max(0, rest - count), min(count, rest))

    @property
    def end(self) -> int:
        return len(self._pages.index.keys) + self._pages.remote.places

    def _is_usable(self, row: int, tier: Residency) -> bool:
        return tier.slot[row] != NOWHERE and (tier is not self._pages.in_host or bool(tier.ready[row]))

    def _page(self, row: int, tier: Residency) -> ResidentPage:
        index = self._pages.index
        parent = index.parent[row]
        return ResidentPage(tier.name, index.key(row), None if parent == NOWHERE else index.keys[parent])
