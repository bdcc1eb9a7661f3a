"""Which pages the remote store has, as far as this server knows, and which it may lack."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Container, Iterator, Sequence

from cached_attention.index import PageKey
from cached_attention.residency import ResidencyFeed, ResidentPage

REMEMBERED = 65_536
"""Keys to remember, at least, at about 260 bytes each."""


class RemotePages:
    """Page keys that were found in the store or put there; the oldest are forgotten first.

    The store drops pages silently, so this is a guess that saves lookups: a page that is not there is a miss when
    it is read, and forgotten pages are looked up again.

    Args:
        most: number of keys to remember; 0: there is no remote store.
        feed: notified of pages that become known or are forgotten.
    """

    def __init__(self, most: int, feed: ResidencyFeed) -> None:
        self._most = most
        self._feed = feed
        self._known: OrderedDict[PageKey, int] = OrderedDict()
        """Place of the page in `_pages`, by key."""
        self._void: OrderedDict[PageKey, int] = OrderedDict()
        """The same for pages that are no longer known, of which the feed has not been notified yet."""
        self._pages: list[ResidentPage | None] = []
        self._free: list[int] = []
        self._unshared: OrderedDict[PageKey, None] = OrderedDict()

    def __contains__(self, key: PageKey) -> bool:
        return key in self._known

    def __len__(self) -> int:
        return len(self._known)

    @property
    def known(self) -> Container[PageKey]:
        """The pages themselves: a lookup there costs less than one here."""
        return self._known

    def add(self, keys: Sequence[PageKey], parent: PageKey | None) -> None:
        """The store has these consecutive pages, the first of which follows `parent`."""
        if not self._most:
            return
        for key in keys:
            if key in self._known:
                self._known.move_to_end(key)
            elif (place := self._void.pop(key, None)) is not None:
                self._known[key] = place
            else:
                self._learn(ResidentPage("remote", key, parent))
            parent = key
        while len(self._known) > self._most:
            self._forget(*self._known.popitem(last=False))

    def _learn(self, page: ResidentPage) -> None:
        if self._free:
            place = self._free.pop()
            self._pages[place] = page
        else:
            place = len(self._pages)
            self._pages.append(page)
        self._known[page.key] = place
        self._feed.entered_page(page)

    def discard(self, key: PageKey) -> None:
        """The store does not have the page."""
        if (place := self._known.pop(key, None)) is not None:
            self._forget(key, place)

    def _forget(self, key: PageKey, place: int) -> None:
        self._pages[place] = None
        self._free.append(place)
        self._feed.left_page("remote", key)

    @property
    def unshared(self) -> int:
        """Number of pages that were in host memory when they were offered, and that the store may lack."""
        return len(self._unshared)

    def offer(self, key: PageKey) -> None:
        """The page is in host memory, and may be put into the store."""
        if key in self._known or not self._most:
            return
        self._unshared[key] = None
        if len(self._unshared) > self._most:
            self._unshared.popitem(last=False)  # The oldest is the first to leave host memory as well.

    def next_unshared(self) -> PageKey | None:
        """Take the oldest offered page that is not known to be in the store; None if there is none."""
        while self._unshared:
            key, _ = self._unshared.popitem(last=False)
            if key not in self._known:
                return key
        return None

    def clear(self) -> None:
        """Forget everything about the store. Constant time, see `tell`."""
        if self._void:
            self._void.update(self._known)  # Not many: the last call was a moment ago.
            self._known.clear()
        else:
            self._known, self._void = OrderedDict(), self._known

    def tell(self, count: int) -> None:
        """Notify the feed of up to `count` pages that `clear` has forgotten."""
        for _ in range(min(count, len(self._void))):
            self._forget(*self._void.popitem(last=False))

    # What the feed was told

    def told(self, key: PageKey) -> ResidentPage | None:
        """The page, if the feed believes it to be known."""
        place = self._known.get(key, self._void.get(key))
        return None if place is None else self._pages[place]

    @property
    def places(self) -> int:
        return len(self._pages)

    def walk(self, first: int, count: int) -> Iterator[ResidentPage]:
        """The known pages at `count` places from `first` on."""
        for page in self._pages[first : first + count]:
            if page is not None and page.key in self._known:
                yield page
