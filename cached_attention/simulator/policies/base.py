"""What the simulator asks of a policy, and what the baselines share."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from cached_attention.index import PageIndex, PageKey, Residency
from cached_attention.policy.demand import WaitingOrder
from cached_attention.policy.eviction import NOT_WAITING, EvictionOrder
from cached_attention.simulator.policies.leaves import Leaves
from cached_attention.simulator.request import Request


class LeafOrder(EvictionOrder):
    """The order of a baseline: of the unpinned leaves, the one with the lowest `value` goes next.

    As in the engine only leaves may go, so that what stays is a usable prefix.

    Args:
        capacity: pages of the tier.
    """

    def __init__(self, index: PageIndex, tier: Residency, waiting: WaitingOrder, capacity: int) -> None:
        super().__init__(index, tier, waiting)
        self.index = index
        self.capacity = capacity
        self._leaves = Leaves(self._evictable, self.value)

    @abstractmethod
    def value(self, row: int) -> Any:
        """Something that can be compared; the lowest goes first."""

    def begin(self, request: Request) -> None:
        """The request runs; what it asks for is marked as used next."""

    def placed(self, row: int) -> None:
        """The page is in the tier; called at least once after it came."""

    def used(self, row: int) -> None:
        """A request came back to the page; called after the index took note of it."""

    def removed(self, row: int) -> None:
        """The page is about to leave the tier."""

    def admits(self, key: PageKey) -> bool:
        """Whether the page, just computed, is worth what would have to go for it."""
        return True

    def offer(self, row: int) -> None:
        if row in self.tier:
            self.placed(row)
            if self._evictable(row):
                self.leaves_of(row).offer(row)

    def offer_many(self, rows: Iterable[int]) -> None:
        for row in rows:
            self.offer(row)

    def take(self, used_before: float = math.inf, for_rank: int = NOT_WAITING) -> int | None:
        leaves = self.next_leaves()
        row = leaves.front()
        if row is None or self.index.last_use[row] >= used_before:
            return None
        leaves.pop()
        self.removed(row)
        return row

    def take_run(self, most: int, for_rank: int = NOT_WAITING) -> list[int]:
        row = self.take(for_rank=for_rank)
        return [] if row is None else [row]

    def leaves_of(self, row: int) -> Leaves:
        """The queue in which the page waits to go."""
        return self._leaves

    def next_leaves(self) -> Leaves:
        """The queue that gives the next page."""
        return self._leaves


MakeOrder = Callable[[PageIndex, Residency, WaitingOrder, int], EvictionOrder]
"""Called with the index, the tier, the waiting requests, and the tier's capacity in pages."""


@dataclass(frozen=True)
class Policy:
    """A name and what it stands for."""

    name: str
    label: str
    make: Callable[[Sequence[Request]], MakeOrder]
    """Called with all requests in the order in which they will run, which only the offline optimum looks at."""
    looks_ahead: bool = False
    """Whether it is told what the waiting requests will ask for."""
    learns: bool = False
    """Whether what no waiting request wants goes by its learnt next use, else by its last use."""
    fetches_ahead: bool = False
    """Whether the disk is asked in the order of the queue, before a request is first to run."""
    refreshes: bool = False
    """Whether waiting requests keep their prefixes recent, as in SGLang's device cache."""
    offline: bool = False
    """Whether it needs all requests beforehand."""
