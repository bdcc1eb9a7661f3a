"""Queued requests that wait for pages on their way from the device to host memory."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import takewhile
from typing import NamedTuple

from cached_attention.hierarchy import Hierarchy
from cached_attention.index import PageKey


class _AwaitedSave(NamedTuple):
    last: PageKey
    """The page that lands last, since saves end in order."""
    until: float
    """Time by which recomputing the pages would have been as fast."""


class AwaitedSaves:
    """Says of queued requests whether the pages that they wait for have been saved.

    Args:
        clock: seconds since the epoch.
    """

    def __init__(self, pages: Hierarchy, clock: Callable[[], float]) -> None:
        self._pages = pages
        self._clock = clock
        self._awaited: dict[str, _AwaitedSave] = {}

    def hold(self, request: str, keys: Sequence[PageKey], recompute: Callable[[int], float]) -> None:
        """See `CachedAttentionStore.await_saves`; `recompute`: seconds to recompute a number of pages."""
        here = list(takewhile(lambda row: row in self._pages.in_host, map(self._pages.index.find, keys)))
        coming = [place for place, row in enumerate(here) if not self._pages.in_host.ready[row]]
        if coming:
            until = self._clock() + recompute(coming[-1] + 1 - coming[0])
            self._awaited[request] = _AwaitedSave(keys[coming[-1]], until)

    def has_landed(self, request: str) -> bool:
        """Whether `request` waits for no save, or has waited long enough."""
        if (awaited := self._awaited.get(request)) is None:
            return True
        row = self._pages.index.find(awaited.last)
        is_coming = row in self._pages.in_host and not self._pages.in_host.ready[row]
        if is_coming and self._clock() < awaited.until:
            return False
        self.leave(request)
        return True

    def leave(self, request: str) -> None:
        """`request` no longer waits for saves."""
        self._awaited.pop(request, None)
