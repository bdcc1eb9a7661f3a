"""The learnt order against LRU on small traces, and what the estimate must never do."""

from __future__ import annotations

import random
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cached_attention.index import NOWHERE, PageIndex
from cached_attention.policy import next_use
from cached_attention.policy.eviction import EvictionOrder
from cached_attention.policy.next_use import BINS, BOUNDS, KINDS, NextUse, bin_of

Trace = list[tuple[float, list[bytes]]]


def pages(name: str, count: int) -> list[bytes]:
    return [f"{name}/{page}".encode() for page in range(count)]


def hits(trace: Trace, capacity: int, estimate: NextUse | None) -> int:
    """Leading pages found in a tier of `capacity` pages; requests run when they come."""
    index = PageIndex("host")
    (tier,) = index.tiers
    order = EvictionOrder(index, tier, next_use=estimate)
    found = 0
    for now, keys in trace:
        kinds = [0] * len(keys)
        if estimate is not None:
            kinds = estimate.asked("request", keys, now)
            estimate.ran("request", now)
        rows: list[int] = []
        for page, key in enumerate(keys):
            row = index.find(key)
            if row not in tier:
                if tier.pages == capacity and not evict(index, order):
                    break
                row = index.add(key, keys[page - 1] if page else None, page)
                index.place(row, tier, row)
            else:
                found += 1
            index.last_use[row], index.kind[row] = now, kinds[page]
            index.pin(row)
            rows.append(row)
        for row in reversed(rows):
            index.unpin(row)
            order.offer(row)
        assert sum(map(order.has_queued, index.rows())) <= tier.pages <= capacity
    return found


def evict(index: PageIndex, order: EvictionOrder) -> bool:
    if (row := order.take()) is None:
        return False
    assert row in order.tier
    assert not index.pins[row]
    assert not order.tier.children[row]
    parent = index.parent[row]
    index.displace(row, order.tier)
    if parent != NOWHERE:
        order.offer(parent)
    return True


def conversations(seed: int, seconds: int, returning: float) -> Trace:
    """Each second a conversation of 4 to 8 pages; a part `returning` of them comes back about every minute."""
    chance = random.Random(seed)
    trace: Trace = []
    for start in range(seconds):
        turns = 8 if chance.random() < returning else 1
        now, length = float(start), chance.randint(4, 8)
        for _ in range(turns):
            trace.append((now, [b"system", *pages(f"c{start}", length)]))
            now += chance.uniform(30, 90)
            length += 1
    return sorted(trace, key=lambda request: request[0])


def test_conversations_that_come_back_outlive_those_that_do_not() -> None:
    trace = conversations(seed=1, seconds=2000, returning=0.15)
    assert hits(trace, 300, NextUse()) > 1.5 * hits(trace, 300, None)


def test_nothing_is_lost_where_there_is_nothing_to_learn() -> None:
    one_shot = conversations(seed=2, seconds=1500, returning=0.0)
    assert hits(one_shot, 200, NextUse()) >= hits(one_shot, 200, None)
    alike = conversations(seed=3, seconds=1500, returning=1.0)
    assert hits(alike, 2000, NextUse()) >= 0.97 * hits(alike, 2000, None)


def test_a_loop_over_more_than_fits_does_not_flush_the_tier() -> None:
    loop = [(float(step), pages(f"d{step % 60}", 5)) for step in range(3000)]
    assert hits(loop, 200, None) == 0
    assert hits(loop, 200, NextUse()) > 0


def test_a_scan_does_not_push_out_what_is_used_often() -> None:
    chance = random.Random(4)
    trace = [
        (float(step), pages(f"hot{chance.randrange(20)}", 5) if step % 2 else pages(f"scan{step}", 5))
        for step in range(4000)
    ]
    assert hits(trace, 120, NextUse()) > 1.3 * hits(trace, 120, None)


@settings(max_examples=30, deadline=None)
@given(
    requests=st.lists(
        st.tuples(st.integers(0, 400), st.integers(0, 12), st.integers(1, 9)), min_size=1, max_size=120
    ),
    capacity=st.integers(4, 40),
)
def test_whatever_comes_a_page_is_found_while_one_may_go(
    requests: list[tuple[int, int, int]], capacity: int
) -> None:
    now, trace = 0.0, []
    for gap, name, count in requests:
        now += gap
        trace.append((now, pages(f"c{name}", count)))
    estimate = NextUse()
    hits(trace, capacity, estimate)
    assert all(worth > 0 for row in estimate.worth for worth in row)


def test_the_order_is_that_of_last_use_while_nothing_was_learnt() -> None:
    estimate = NextUse()
    for row in estimate.worth:
        assert all(older < younger for younger, older in pairwise(row))
    assert len({tuple(row) for row in estimate.worth}) == 1


def test_bins_follow_the_bounds() -> None:
    assert [bin_of(bound) for bound in BOUNDS[:-1]] == list(range(BINS))
    assert (bin_of(-1.0), bin_of(1e12)) == (0, BINS - 1)
    assert max(next_use.KIND) + next_use.ENDS == KINDS - 1


def test_what_is_watched_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(next_use, "WATCHED", 500)
    estimate = NextUse()
    for step in range(1000):
        estimate.asked("request", pages(f"c{step}", 20), float(step))
        estimate.ran("request", float(step))
        assert len(estimate._watched) <= 500 + 20
    assert sum(map(len, estimate._by_bin)) <= 2 * 520


def test_the_sample_recovers_after_a_busy_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(next_use, "WATCHED", 500)
    estimate = NextUse(2000)

    def serve(name: str, prompts: int, gap: float) -> None:
        for step in range(prompts):
            now = estimate.now + gap
            estimate.asked("request", pages(f"{name}{step}", 20), now)
            estimate.ran("request", now)

    assert estimate._duel is not None
    before = estimate._threshold, estimate._duel.size
    serve("busy", 4000, 1.0)
    assert estimate._threshold < before[0] / 64
    assert estimate._duel.size == before[1], "the ghost caches shrink with what is watched"
    assert len(estimate._duel.lru) > before[1] / 2
    serve("quiet", 200, BOUNDS[-2] / 20)
    assert estimate._threshold > before[0] / 4
    assert len(estimate._watched) <= 500 + 20
    assert sum(map(len, estimate._by_bin)) <= 2 * 520
    assert all(watch.bin < BINS - 1 for watch in estimate._watched.values())


def test_a_page_counts_no_more_uses_than_those_before_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(next_use, "CELLS", 7)
    estimate = NextUse()
    for now in range(3):
        for name in "abcdef":
            estimate.asked(name, pages(name, 20), float(now))
            estimate.ran(name, float(now))
    kinds = [*estimate.asked("g", pages("g", 20), 3.0)[:-1], *estimate.kinds(pages("h", 20), before=2)]
    assert kinds[:19] == sorted(kinds[:19], reverse=True)
    assert kinds[19:] == sorted(kinds[19:], reverse=True)
    assert kinds[19] <= 2
