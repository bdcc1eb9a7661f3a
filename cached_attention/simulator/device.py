"""What the device keeps of finished turns."""

from __future__ import annotations

from collections.abc import Sequence

from cached_attention.index import PageIndex, PageKey
from cached_attention.policy.eviction import EvictionOrder


class DeviceCache:
    """An LRU prefix cache of `capacity` pages, like the engine's radix tree; 0: nothing is kept between turns.

    Pages of running requests are not part of it.
    """

    def __init__(self, capacity: int) -> None:
        self._capacity = capacity
        self._index = PageIndex("device")
        (self._tier,) = self._index.tiers
        self._order = EvictionOrder(self._index, self._tier)
        self._uses = 0.0

    def match(self, keys: Sequence[PageKey]) -> int:
        """Number of leading pages of `keys` in the cache; they count as used now."""
        self._uses += 1
        for pages, key in enumerate(keys):
            if (row := self._index.find(key)) not in self._tier:
                return pages
            self._index.last_use[row] = self._uses
        return len(keys)

    def insert(self, keys: Sequence[PageKey]) -> None:
        """Keep the pages `keys`; the coldest are evicted for them."""
        parent: PageKey | None = None
        self._uses += 1
        for place, key in enumerate(keys[: self._capacity]):
            row = self._index.add(key, parent, place)
            self._index.last_use[row] = self._uses
            if row not in self._tier:
                self._index.place(row, self._tier, row)
            parent = key
        if parent is not None:
            self._order.offer(self._index.find(parent))
        while self._tier.pages > self._capacity and (coldest := self._order.take()) is not None:
            before = self._index.parent[coldest]
            self._index.displace(coldest, self._tier)
            if before >= 0:
                self._order.offer(before)
