"""What is in the remote store, as far as this server knows, and what it might lack."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator, Sequence

from cached_attention.index import PageKey
from cached_attention.residency import ResidencyFeed, ResidentPage

REMEMBERED = 65_536
"""Keys that are remembered at least, at about 220 bytes each."""


class RemotePages:
    """Page keys that were seen in the store or put there, the oldest forgotten first.

    The store drops pages without a word, so this is a guess that saves questions: a page that is not there is
    a miss when it is read, and what was forgotten is asked for again.

    Args:
        most: keys that are remembered; 0: there is no remote store.
        feed: is told what becomes known and what is forgotten.
    """

    def __init__(self, most: int, feed: ResidencyFeed) -> None:
        self._most = most
        self._feed = feed
        self._known: OrderedDict[PageKey, int] = OrderedDict()
        """By key, the place of the page in `_pages`."""
        self._void: OrderedDict[PageKey, int] = OrderedDict()
        """Not known any more, which the feed has not been told."""
        self._pages: list[ResidentPage | None] = []
        self._free: list[int] = []
        self._unshared: OrderedDict[PageKey, None] = OrderedDict()

    def __contains__(self, key: PageKey) -> bool:
        return key in self._known

    def __len__(self) -> int:
        return len(self._known)

    def add(self, keys: Sequence[PageKey], parent: PageKey | None) -> None:
        """The store has these pages, each of which follows the one before it, and the first of them `parent`."""
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
        """The store does not have it."""
        if (place := self._known.pop(key, None)) is not None:
            self._forget(key, place)

    def _forget(self, key: PageKey, place: int) -> None:
        self._pages[place] = None
        self._free.append(place)
        self._feed.left_page("remote", key)

    @property
    def unshared(self) -> int:
        """Pages that were in host memory when they were offered, and that the store may lack."""
        return len(self._unshared)

    def offer(self, key: PageKey) -> None:
        """The page is in host memory."""
        if key not in self._known and len(self._unshared) < self._most:
            self._unshared[key] = None

    def next_unshared(self) -> PageKey | None:
        """The oldest, which is offered no more; None where there is none."""
        while self._unshared:
            key, _ = self._unshared.popitem(last=False)
            if key not in self._known:
                return key
        return None

    def clear(self) -> None:
        """Nothing is known of the store any more. Constant time: see `tell`."""
        if self._void:
            self._void.update(self._known)  # Not many: the last time was a moment ago.
            self._known.clear()
        else:
            self._known, self._void = OrderedDict(), self._known

    def tell(self, count: int) -> None:
        """Let the feed know of up to `count` pages that are not known any more since `clear`."""
        for _ in range(min(count, len(self._void))):
            self._forget(*self._void.popitem(last=False))

    # What the feed was told

    def told(self, key: PageKey) -> ResidentPage | None:
        """The page, as long as the feed takes it for known."""
        place = self._known.get(key, self._void.get(key))
        return None if place is None else self._pages[place]

    @property
    def places(self) -> int:
        return len(self._pages)

    def walk(self, first: int, count: int) -> Iterator[ResidentPage]:
        """The pages that are known at so many places."""
        for page in self._pages[first : first + count]:
            if page is not None and page.key in self._known:
                yield page
