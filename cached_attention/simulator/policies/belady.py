"""The offline optimum, as a bound."""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Sequence

from cached_attention.index import PageIndex, PageKey, Residency
from cached_attention.policy.demand import WaitingOrder
from cached_attention.simulator.policies.base import LeafOrder, MakeOrder
from cached_attention.simulator.request import Request


class Future:
    """Uses of each page, as positions in the execution order."""

    def __init__(self, requests: Sequence[Request]) -> None:
        self.now = -1
        """Position of the last request that has begun."""
        self._uses: dict[PageKey, list[int]] = {}
        self._places = {request.name: place for place, request in enumerate(requests)}
        for place, request in enumerate(requests):
            for key in request.prompt_keys:
                self._uses.setdefault(key, []).append(place)

    def begin(self, request: Request) -> None:
        self.now = max(self.now, self._places[request.name])

    def next_use(self, key: PageKey) -> float:
        """Position of the next request that uses the page; infinity if there is none."""
        uses = self._uses.get(key, [])
        place = bisect_right(uses, self.now)
        return uses[place] if place < len(uses) else math.inf


class Belady(LeafOrder):
    """Evicts the page whose next use is latest, and does not admit a new one whose next use is later still.

    Belady, IBM Systems Journal 5 (2), 1966. The next use of a page is no later than that of the pages that follow
    it, so restricting evictions to leaves costs the optimum nothing.
    """

    def __init__(
        self, index: PageIndex, tier: Residency, waiting: WaitingOrder, capacity: int, future: Future
    ) -> None:
        super().__init__(index, tier, waiting, capacity)
        self.future = future

    @classmethod
    def of(cls, requests: Sequence[Request]) -> MakeOrder:
        future = Future(requests)
        return lambda index, tier, waiting, capacity: cls(index, tier, waiting, capacity, future)

    def begin(self, request: Request) -> None:
        self.future.begin(request)

    def value(self, row: int) -> float:
        return -self.future.next_use(self.index.key(row))

    def used(self, row: int) -> None:
        self.offer(row)  # Its next use is later now.

    def admits(self, key: PageKey) -> bool:
        row = self._leaves.front()
        full = self.tier.pages >= self.capacity
        return not full or (row is not None and self.value(row) < -self.future.next_use(key))
