"""What is in the remote store, as far as this server knows, and what it might lack."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable

from cached_attention.index import PageKey

REMEMBERED = 65_536
"""Keys that are remembered at least, at about 200 bytes each."""


class RemotePages:
    """Page keys that were seen in the store or put there, the oldest forgotten first.

    The store drops pages without a word, so this is a guess that saves questions: a page that is not there is
    a miss when it is read, and what was forgotten is asked for again.

    Args:
        most: keys that are remembered; 0: there is no remote store.
    """

    def __init__(self, most: int = 0) -> None:
        self._most = most
        self._known: OrderedDict[PageKey, None] = OrderedDict()
        self._unshared: OrderedDict[PageKey, None] = OrderedDict()

    def __contains__(self, key: PageKey) -> bool:
        return key in self._known

    def __len__(self) -> int:
        return len(self._known)

    def add(self, keys: Iterable[PageKey]) -> None:
        """The store has these."""
        if not self._most:
            return
        for key in keys:
            self._known[key] = None
            self._known.move_to_end(key)
        while len(self._known) > self._most:
            self._known.popitem(last=False)

    def discard(self, key: PageKey) -> None:
        """The store does not have it."""
        self._known.pop(key, None)

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
        """Nothing is known of the store any more."""
        self._known = OrderedDict()
