"""Leaves of a tier by value, lowest first."""

from __future__ import annotations

import heapq
from collections.abc import Callable
from typing import Any


class Leaves:
    """Rows that may be evicted. An entry is checked when it reaches the front: it is dropped if the row may not
    be evicted, and updated if its value has risen. Whatever lowers a value must offer the row again.

    Args:
        evictable: whether a row may be evicted now.
        value: comparable value of an evictable row.
    """

    def __init__(self, evictable: Callable[[int], bool], value: Callable[[int], Any]) -> None:
        self._evictable = evictable
        self._value = value
        self._heap: list[tuple[Any, int]] = []
        self._lowest: dict[int, Any] = {}
        """Value of each row's valid entry."""

    def __contains__(self, row: int) -> bool:
        return row in self._lowest

    def offer(self, row: int) -> None:
        value = self._value(row)
        if row not in self._lowest or value < self._lowest[row]:
            self._lowest[row] = value
            heapq.heappush(self._heap, (value, row))

    def front(self) -> int | None:
        """The row to evict next; it is not removed."""
        while self._heap:
            value, row = self._heap[0]
            if self._lowest.get(row) != value:
                heapq.heappop(self._heap)  # It was offered again with a lower value.
            elif not self._evictable(row):
                self.pop()
            elif (risen := self._value(row)) != value:
                self._lowest[row] = risen
                heapq.heapreplace(self._heap, (risen, row))
            else:
                return row
        return None

    def pop(self) -> None:
        """Remove the row that `front` returned."""
        _, row = heapq.heappop(self._heap)
        del self._lowest[row]
