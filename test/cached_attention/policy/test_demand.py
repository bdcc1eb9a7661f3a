"""Eviction with a waiting queue, against a model that looks at every page and every request anew."""

from __future__ import annotations

import math

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from cached_attention.index import NOWHERE, PageIndex
from cached_attention.policy.demand import WaitingOrder
from cached_attention.policy.eviction import NOT_WAITING, EvictionOrder

REQUESTS = [f"r{number}" for number in range(6)]


class QueueOverPages(RuleBasedStateMachine):
    """Pages are words over 'ab'; the parent of a page is the word without its last letter."""

    @initialize()
    def start(self) -> None:
        self.index = PageIndex("host")
        (self.tier,) = self.index.tiers
        self.waiting = WaitingOrder()
        self.order = EvictionOrder(self.index, self.tier, self.waiting)
        self.resident: set[str] = set()
        self.pinned: dict[str, int] = {}
        self.queue: list[str] = []
        self.wants: dict[str, str] = {}
        """Per request the longest chain, as it was when the request asked."""
        self.now = 0.0

    def row(self, word: str) -> int:
        return self.index.find(word.encode())

    @rule(letter=st.sampled_from("ab"), data=st.data())
    def place(self, letter: str, data: st.DataObject) -> None:
        word = data.draw(st.sampled_from(["", *sorted(self.resident)])) + letter
        if word in self.resident or len(word) > 5:
            return
        stem = word[:-1]
        row = self.index.add(word.encode(), stem.encode() if stem else None, len(stem))
        self.now += 1
        self.index.last_use[row] = self.now
        self.index.place(row, self.tier, len(self.resident))
        self.resident.add(word)
        self.order.offer(row)

    @precondition(lambda self: self.resident)
    @rule(request=st.sampled_from(REQUESTS), data=st.data())
    def arrive(self, request: str, data: st.DataObject) -> None:
        word = data.draw(st.sampled_from(sorted(self.resident)))
        self.waiting.append(request)
        self.order.demand.want(request, self.row(word))
        if request not in self.queue:
            self.queue.append(request)
        self.wants[request] = word

    @rule(request=st.sampled_from(REQUESTS))
    def leave(self, request: str) -> None:
        self.order.demand.forget(request)
        self.waiting.discard(request)
        self.forget(request)

    def forget(self, request: str) -> None:
        self.wants.pop(request, None)
        if request in self.queue:
            self.queue.remove(request)

    @rule(data=st.data())
    def reorder(self, data: st.DataObject) -> None:
        queue = data.draw(st.permutations(self.queue))
        stay = data.draw(st.integers(0, len(queue)))
        left = self.waiting.replace([*queue[:stay], "unknown"])
        assert sorted(left) == sorted(queue[stay:])
        for request in left:
            self.order.demand.forget(request)
            self.forget(request)
        self.queue = queue[:stay]

    @precondition(lambda self: self.resident)
    @rule(data=st.data())
    def pin(self, data: st.DataObject) -> None:
        word = data.draw(st.sampled_from(sorted(self.resident)))
        self.index.pin(self.row(word))
        self.pinned[word] = self.pinned.get(word, 0) + 1

    @precondition(lambda self: self.pinned)
    @rule(data=st.data())
    def unpin(self, data: st.DataObject) -> None:
        word = data.draw(st.sampled_from(sorted(self.pinned)))
        row = self.row(word)
        self.pinned[word] -= 1
        if not self.pinned[word]:
            del self.pinned[word]
        self.index.unpin(row)
        self.order.offer(row)

    def rank(self, word: str) -> int | None:
        """Of the first request in the queue whose chain includes `word`."""
        ranks = (r for r, request in enumerate(self.queue) if self.wants.get(request, "").startswith(word))
        return next(ranks, None)

    def evictable(self) -> list[str]:
        words = (word for word in self.resident if word not in self.pinned)
        return [word for word in words if not any(word + letter in self.resident for letter in "ab")]

    @rule(for_rank=st.sampled_from([NOT_WAITING, 0, 1, 3]), before=st.sampled_from([math.inf, 3.0]))
    def evict(self, for_rank: int, before: float) -> None:
        leaves = self.evictable()
        unwanted = [word for word in leaves if self.rank(word) is None]
        ranks = {word: rank for word in leaves if (rank := self.rank(word)) is not None and rank > for_rank}
        row = self.order.take(before, for_rank)
        victim = None if row is None else self.index.key(row).decode()
        coldest = min(unwanted, key=lambda word: self.index.last_use[self.row(word)], default=None)
        if coldest is not None and self.index.last_use[self.row(coldest)] < before:
            assert victim == coldest
        elif before < math.inf or not ranks or coldest is not None:
            assert victim is None
        else:
            assert victim is not None
            assert ranks[victim] == max(ranks.values())
        if victim is not None and row is not None:
            self.displace(victim, row)

    def displace(self, victim: str, row: int) -> None:
        parent = self.index.parent[row]
        self.order.demand.left(row)
        self.index.displace(row, self.tier)
        self.resident.remove(victim)
        if parent != NOWHERE:
            self.order.offer(parent)
        for request, word in self.wants.items():
            if word == victim:
                self.wants[request] = victim[:-1]

    @invariant()
    def whole(self) -> None:
        if hasattr(self, "index"):
            self.order.demand.check_invariants()
            assert self.waiting.requests == self.queue
            assert [self.waiting.rank(request) for request in self.queue] == list(range(len(self.queue)))


def test_a_wanted_page_that_was_passed_over_is_found_again() -> None:
    index, waiting = PageIndex("host"), WaitingOrder()
    (tier,) = index.tiers
    order = EvictionOrder(index, tier, waiting)
    rows = []
    for number in range(3):
        rows.append(index.add(b"%d" % number, None, 0))
        index.place(rows[-1], tier, number)
        waiting.append(f"r{number}")
        order.demand.want(f"r{number}", rows[-1])
    for row in rows:
        index.pin(row)
    assert order.take() is None
    for row in (rows[1], rows[2]):
        index.unpin(row)
        order.offer(row)
    assert order.take() == rows[2]


TestQueueOverPages = QueueOverPages.TestCase
TestQueueOverPages.settings = settings(max_examples=150, stateful_step_count=60, deadline=None)
