"""Which pages queued requests need: the look-ahead of prefetching and eviction (section 3.3 of the paper)."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from cached_attention.index import NOWHERE, PageIndex, Residency


class WaitingOrder:
    """Queued requests and their ranks in the order in which the scheduler will run them, from 0."""

    def __init__(self) -> None:
        self.requests: list[str] = []
        self._ranks: dict[str, int] = {}
        """Position of each queued request as of change `_ranked_at`; `rank` refreshes it."""
        self._ranked_at = 0
        self.changes = 0
        """Number of changes of the order; what is derived from it can be cached until the next one."""

    def __len__(self) -> int:
        return len(self.requests)

    def __contains__(self, request: str) -> bool:
        return request in self._ranks

    def rank(self, request: str) -> int:
        if self._ranked_at != self.changes:
            self._ranks = dict(zip(self.requests, range(len(self.requests)), strict=True))
            self._ranked_at = self.changes
        return self._ranks[request]

    def append(self, request: str) -> None:
        """`request` is queued, behind all others until the scheduler reorders the queue."""
        if request not in self._ranks:
            self._ranks[request] = len(self.requests)
            self.requests.append(request)
            if self._ranked_at == self.changes:
                self._ranked_at += 1  # The other ranks stay as they are.
            self.changes += 1

    def replace(self, requests: list[str]) -> list[str]:
        """Adopt the scheduler's order of the known requests; returns the requests that have left the queue."""
        if requests == self.requests:
            return []
        ordered = [request for request in requests if request in self._ranks]
        if ordered == self.requests:
            return []
        left = self._ranks.keys() - set(ordered) if len(ordered) < len(self.requests) else ()
        self.requests = ordered
        for request in left:
            del self._ranks[request]
        self.changes += 1
        return list(left)

    def discard(self, request: str) -> None:
        if request in self._ranks:
            del self._ranks[request]
            self.requests.remove(request)
            self.changes += 1


class Demand:
    """Which pages of one tier the queued requests need.

    Only leaves of a tier can be evicted, so it is enough to know, for each request, the last page of its chain
    that is in the tier: its anchor. The anchor keeps all pages before it, and those after it are not needed. So a
    request costs one entry, however long its chain, and a new order of the queue costs one walk over requests.

    Args:
        freed: called with a row that no queued request needs any more.
    """

    def __init__(
        self, order: WaitingOrder, index: PageIndex, tier: Residency, freed: Callable[[int], None]
    ) -> None:
        self._order = order
        self._index = index
        self._tier = tier
        self._freed = freed
        self._anchors: dict[str, int] = {}
        self._requests: dict[int, set[str]] = {}
        self._first: dict[int, int] = {}
        """Per anchor: rank of the first request that needs it."""
        self._cursor, self._fresh = 0, -1

    def want(self, request: str, row: int) -> None:
        """`request` needs the pages up to `row`, as far as they are in the tier."""
        while row != NOWHERE and row not in self._tier:
            row = self._index.parent[row]
        if self._anchors.get(request, NOWHERE) != row:
            self.forget(request)
            self._place(request, row)

    def _place(self, request: str, row: int) -> None:
        if row != NOWHERE:
            self._anchors[request] = row
            self._requests.setdefault(row, set()).add(request)
            rank = self._order.rank(request)
            self._first[row] = min(rank, self._first.get(row, rank))
            self.offer(row)

    def forget(self, request: str) -> None:
        """`request` no longer needs any page."""
        row = self._anchors.pop(request, NOWHERE)
        if row == NOWHERE:
            return
        self._requests[row].discard(request)
        self._fresh = -1
        if not self._requests[row]:
            del self._requests[row]
            self._freed(row)

    def is_wanted(self, row: int) -> bool:
        """Whether `row`, a leaf of the tier, is an anchor."""
        return row in self._requests

    def rank(self, row: int) -> int:
        """Rank of the first request that needs the anchor `row`."""
        self._refresh()
        return self._first[row]

    def left(self, row: int) -> None:
        """The page has left the tier: its requests get the last page before it in the tier as their anchor."""
        parent = self._index.parent[row]
        while parent != NOWHERE and parent not in self._tier:
            parent = self._index.parent[parent]
        for request in self._requests.pop(row, ()):
            del self._anchors[request]
            self._place(request, parent)

    def furthest(self) -> Iterator[int]:
        """Anchors from the back of the queue to its front; resumes where the last call stopped.

        The walk restarts when the order of the queue changes, and moves back to anchors that are offered, so
        taking many anchors costs one walk over the queue, not one each.
        """
        self._refresh()
        while self._cursor:
            request = self._order.requests[self._cursor - 1]
            row = self._anchors.get(request, NOWHERE)
            if row != NOWHERE and self._first[row] == self._cursor - 1:
                yield row
                if self._anchors.get(request) != row:
                    continue  # It was taken: the request has another anchor now.
            self._cursor -= 1

    def offer(self, row: int) -> None:
        """The anchor `row` may have become evictable: the walk of `furthest` moves back to it."""
        self._cursor = max(self._cursor, self._first[row] + 1)

    def _refresh(self) -> None:
        if self._fresh == self._order.changes:
            return
        self._fresh, self._cursor = self._order.changes, len(self._order)
        self._first.clear()
        for rank, request in enumerate(self._order.requests):
            if request in self._anchors:
                self._first.setdefault(self._anchors[request], rank)

    def check_invariants(self) -> None:
        """Raises AssertionError if an anchor is not in the tier, or its request is not queued."""
        for request, row in self._anchors.items():
            assert request in self._order, f"{request} wants pages and does not wait"
            assert row in self._tier, "an anchor is not in the tier"
            assert request in self._requests[row]
        assert sum(map(len, self._requests.values())) == len(self._anchors)
