"""Interface of a policy in the simulator, and the common part of the baselines."""

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
    """Eviction order of a baseline: of the unpinned leaves, the one with the lowest `value` is evicted next.

    As in the engine, only leaves are evicted, so that the remaining pages form a usable prefix.

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
        """Any comparable value; the lowest is evicted first."""

    def begin(self, request: Request) -> None:
        """The request runs; the pages it asks for are marked as used next."""

    def placed(self, row: int) -> None:
        """The page is in the tier; called at least once after it was placed there."""

    def used(self, row: int) -> None:
        """A request used the page again; called after the index recorded the use."""

    def removed(self, row: int) -> None:
        """The page is about to leave the tier."""

    def admits(self, key: PageKey) -> bool:
        """Whether the page, just computed, is worth the page that would be evicted for it."""
        return True

    def offer(self, row: int) -> None:
        if row in self.tier:
            self.placed(row)
            if self._evictable(row):
                self.leaves_of(row).offer(row)

    def offer_many(self, rows: Iterable[int]) -> None:
        for row in rows:
            self.offer(row)

    def has_queued(self, row: int) -> bool:
        return row in self.leaves_of(row)

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
        """The queue in which the page waits for eviction."""
        return self._leaves

    def next_leaves(self) -> Leaves:
        """The queue from which the next page is evicted."""
        return self._leaves


MakeOrder = Callable[[PageIndex, Residency, WaitingOrder, int], EvictionOrder]
"""Called with the index, the tier, the waiting requests, and the tier's capacity in pages."""


@dataclass(frozen=True)
class Policy:
    """A policy and its properties."""

    name: str
    label: str
    make: Callable[[Sequence[Request]], MakeOrder]
    """Called with all requests in execution order, which only the offline optimum uses."""
    looks_ahead: bool = False
    """Whether it knows what the waiting requests will ask for."""
    learns: bool = False
    """Whether pages that no waiting request needs are evicted by learnt next use, else by last use."""
    fetches_ahead: bool = False
    """Whether pages are fetched from disk in queue order, before their request is due to run."""
    refreshes: bool = False
    """Whether waiting requests keep their prefixes recent, as in SGLang's device cache."""
