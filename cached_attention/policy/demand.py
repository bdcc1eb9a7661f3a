"""What the waiting queue will ask for: the look-ahead of fetch and eviction (the paper's section 3.3)."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from cached_attention.index import NOWHERE, PageIndex, Residency


class WaitingOrder:
    """Waiting requests and their ranks in the order in which the scheduler will run them, 0 first."""

    def __init__(self) -> None:
        self.requests: list[str] = []
        self._ranks: dict[str, int] = {}
        """Of all that wait; of `_ranked_at` changes, and right at the next call of `rank`."""
        self._ranked_at = 0
        self.changes = 0
        """Counts changes of the order, so that what was derived from it can be kept until the next."""

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
        """`request` waits, behind all others until the scheduler says otherwise."""
        if request not in self._ranks:
            self._ranks[request] = len(self.requests)
            self.requests.append(request)
            self._ranked_at += self._ranked_at == self.changes
            self.changes += 1

    def replace(self, requests: list[str]) -> list[str]:
        """The scheduler's order now, of requests that are known; returns those that wait no more."""
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
    """Which pages of one tier the waiting requests will ask for.

    Only leaves of a tier may go, so it is enough to know, for each request, the last page of its chain
    that is in the tier: its anchor. All before it are kept by the anchor, and all after it are unwanted.
    So a request costs one entry, however long its chain, and a new order of the queue costs nothing here.

    Args:
        freed: called with a row that no waiting request wants any more.
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
        """Per anchor the rank of the first request that wants it."""
        self._cursor, self._fresh = 0, -1

    def want(self, request: str, row: int) -> None:
        """`request` will ask for the pages up to `row`; pages of it that are not in the tier do not count."""
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
        """`request` wants nothing any more."""
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
        """Of the first request that wants the anchor `row`."""
        self._refresh()
        return self._first[row]

    def left(self, row: int) -> None:
        """The page has left the tier: what its requests can still have ends before it."""
        parent = self._index.parent[row]
        while parent != NOWHERE and parent not in self._tier:
            parent = self._index.parent[parent]
        for request in self._requests.pop(row, ()):
            del self._anchors[request]
            self._place(request, parent)

    def furthest(self) -> Iterator[int]:
        """Anchors from the back of the queue on; goes on where it was left last time.

        The walk starts anew when the order of the queue changes, and goes back to what is offered, so taking
        many anchors costs one walk over the queue, not one each.
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
        """The anchor `row` may have become evictable: the walk of `furthest` goes back to it."""
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
        """Raises AssertionError where an anchor is not in the tier, or its request does not wait."""
        for request, row in self._anchors.items():
            assert request in self._order, f"{request} wants pages and does not wait"
            assert row in self._tier, "an anchor is not in the tier"
            assert request in self._requests[row]
        assert sum(map(len, self._requests.values())) == len(self._anchors)
