"""Pages that eviction has passed over for now."""

from __future__ import annotations

import heapq
from collections.abc import Callable

from cached_attention.index import PageIndex

STALE = 1024
"""Stale entries that are tolerated beyond as many as there are pages."""


class SetAside:
    """A set of rows, from which the first or the least recently used is taken."""

    def __init__(self, index: PageIndex) -> None:
        self._index = index
        self._rows: dict[int, None] = {}
        self._by_use: list[tuple[float, int]] = []
        """Heap of (last use, row), among stale entries."""

    def __contains__(self, row: int) -> bool:
        return row in self._rows

    def add(self, row: int) -> None:
        self._rows[row] = None
        heapq.heappush(self._by_use, (self._index.last_use[row], row))
        if len(self._by_use) > 2 * len(self._rows) + STALE:
            self._by_use = [(self._index.last_use[row], row) for row in self._rows]
            heapq.heapify(self._by_use)

    def take_first(self, may_go: Callable[[int], bool]) -> int | None:
        """The row added first, or None if there is none; rows that may not go are removed as well."""
        while (row := next(iter(self._rows), None)) is not None:
            del self._rows[row]
            if may_go(row):
                return row
        return None

    def take_coldest(self, used_before: float, may_go: Callable[[int], bool]) -> int | None:
        """Like `take_first`, the least recently used row; None if none was last used before `used_before`."""
        while self._by_use and self._by_use[0][0] < used_before:
            known, row = heapq.heappop(self._by_use)
            if row not in self._rows:
                continue
            if (last_use := self._index.last_use[row]) > known:
                heapq.heappush(self._by_use, (last_use, row))
                continue
            del self._rows[row]
            if may_go(row):
                return row
        return None
