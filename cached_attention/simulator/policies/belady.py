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
    """When each page is asked for, by place in the order of execution."""

    def __init__(self, requests: Sequence[Request]) -> None:
        self.now = -1
        """Place of the last request that was begun."""
        self._uses: dict[PageKey, list[int]] = {}
        self._places = {request.name: place for place, request in enumerate(requests)}
        for place, request in enumerate(requests):
            for key in request.prompt_keys:
                self._uses.setdefault(key, []).append(place)

    def begin(self, request: Request) -> None:
        self.now = max(self.now, self._places[request.name])

    def next_use(self, key: PageKey) -> float:
        """The place of the next request that asks for the page; infinity where none does."""
        uses = self._uses.get(key, [])
        place = bisect_right(uses, self.now)
        return uses[place] if place < len(uses) else math.inf


class Belady(LeafOrder):
    """The page that is asked for last goes first, and a new one stays out if it is asked for later still.

    Belady, IBM Systems Journal 5 (2), 1966. A page is asked for no later than what follows it, so keeping to
    leaves costs the optimum nothing.
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
