"""Leaves of a tier by value, lowest first."""

from __future__ import annotations

import heapq
from collections.abc import Callable
from typing import Any


class Leaves:
    """Rows that may go. An entry is checked when it reaches the front: what may not go is dropped, and what has
    risen since is put right. Whatever lowers a value must offer the row again.

    Args:
        evictable: whether a row may go now.
        value: of a row that may go, something that can be compared.
    """

    def __init__(self, evictable: Callable[[int], bool], value: Callable[[int], Any]) -> None:
        self._evictable = evictable
        self._value = value
        self._heap: list[tuple[Any, int]] = []
        self._lowest: dict[int, Any] = {}
        """Per row the value of its entry that counts."""

    def offer(self, row: int) -> None:
        value = self._value(row)
        if row not in self._lowest or value < self._lowest[row]:
            self._lowest[row] = value
            heapq.heappush(self._heap, (value, row))

    def front(self) -> int | None:
        """The row that goes next; it stays."""
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
        """Drop what `front` gave."""
        _, row = heapq.heappop(self._heap)
        del self._lowest[row]
