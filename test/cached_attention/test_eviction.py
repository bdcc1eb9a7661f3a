"""The index and the eviction order against a model that recomputes everything."""

from __future__ import annotations

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from cached_attention.index import NOWHERE, PageIndex
from cached_attention.policy.eviction import EvictionOrder


class TreeOfPages(RuleBasedStateMachine):
    """Pages are words over 'ab'; the parent of a page is the word without its last letter."""

    def __init__(self) -> None:
        super().__init__()
        self.resident: dict[str, float] = {}
        self.pinned: dict[str, int] = {}
        self.now = 0.0

    @initialize()
    def start(self) -> None:
        self.index = PageIndex("host")
        (self.tier,) = self.index.tiers
        self.order = EvictionOrder(self.index, self.tier)
        self.slots = iter(range(10**9))

    def row(self, word: str) -> int:
        return self.index.find(word.encode())

    def tick(self) -> float:
        self.now += 1
        return self.now

    @rule(letter=st.sampled_from("ab"), data=st.data())
    def place(self, letter: str, data: st.DataObject) -> None:
        stem = data.draw(st.sampled_from(["", *sorted(self.resident)]))
        word = stem + letter
        if word in self.resident or len(word) > 6:
            return
        row = self.index.add(word.encode(), stem.encode() if stem else None, len(stem))
        self.index.place(row, self.tier, next(self.slots))
        self.index.last_use[row] = self.resident[word] = self.tick()
        self.order.offer(row)

    @precondition(lambda self: self.resident)
    @rule(data=st.data())
    def touch(self, data: st.DataObject) -> None:
        word = data.draw(st.sampled_from(sorted(self.resident)))
        self.index.last_use[self.row(word)] = self.resident[word] = self.tick()

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
        self.pinned[word] -= 1
        if not self.pinned[word]:
            del self.pinned[word]
        row = self.row(word)
        self.index.unpin(row)
        self.order.offer(row)

    @rule()
    def evict(self) -> None:
        row = self.order.take()
        leaves = [
            word
            for word in self.resident
            if word not in self.pinned and not any(word + letter in self.resident for letter in "ab")
        ]
        if row is None:
            assert not leaves
            return
        key = self.index.keys[row]
        assert key is not None
        victim = key.decode()
        assert victim in leaves
        assert self.resident[victim] == min(self.resident[word] for word in leaves)
        parent = self.index.parent[row]
        self.index.displace(row, self.tier)
        if parent != NOWHERE:
            self.order.offer(parent)
            stem = victim[:-1]
            self.resident[stem] = max(self.resident[stem], self.resident[victim])
        del self.resident[victim]

    @invariant()
    def index_agrees(self) -> None:
        if not hasattr(self, "index"):
            return
        self.index.check_invariants()
        assert self.tier.pages == len(self.index) == len(self.resident)
        assert {self.index.keys[row] for row in self.index.rows()} == {w.encode() for w in self.resident}
        assert sum(map(len, self.order._queues)) <= len(self.index.keys)


TestTreeOfPages = TreeOfPages.TestCase
TestTreeOfPages.settings = settings(max_examples=60, stateful_step_count=60, deadline=None)


def test_an_order_of_which_only_the_coldest_are_taken_does_not_grow() -> None:
    index = PageIndex("disk")
    (tier,) = index.tiers
    order = EvictionOrder(index, tier)
    for page in range(20_000):
        row = index.add(b"%d" % page, None, 0)
        index.last_use[row] = float(page)
        index.place(row, tier, page)
        order.offer(row)
        if page >= 100:
            assert order.take(float(page)) is not None
            index.displace(index.find(b"%d" % (page - 100)), tier)
    assert len(order._fronts) <= 4 * len(order._queues) + 1
    assert order.take() == index.find(b"19900")
