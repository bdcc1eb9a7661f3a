"""The choice between LRU and the learnt order: what it must find, what it may never cost, and its bounds."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cached_attention.policy import duel
from cached_attention.policy.duel import EVERYTHING, Duel, GhostCache, Sampled

BOUNDS = [0.0, 10.0, 100.0]
RECENT = [[3.0, 2.0, 1.0]] * 2
"""Worth falls with age alone."""
SECOND = [[3.0, 2.0, 1.0], [6.0, 5.0, 4.0]]
"""Pages of the second class are worth more at any age."""


def page(number: int, kind: int = 0) -> Sampled:
    return Sampled(number.to_bytes(8, "big"), kind)


def request(chooser: Duel, pages: Sequence[Sampled], worth: list[list[float]], now: float) -> None:
    chooser.asked(pages)
    chooser.ran(pages, worth, now)


def test_a_small_ghost_cache_evicts_exactly() -> None:
    ghosts = GhostCache(BOUNDS)
    for number in range(8):
        ghosts.put(page(number), float(number))
    ghosts.put(page(0), 9.0)
    ghosts.shrink(5, None, 9.0)
    assert [number for number in range(8) if page(number).key in ghosts] == [0, 4, 5, 6, 7]


def test_worth_decides_and_then_the_last_use() -> None:
    ghosts = GhostCache(BOUNDS)
    for number in range(8):
        ghosts.put(page(number, kind=number % 2), float(number))
    ghosts.shrink(3, SECOND, 8.0)
    assert [number for number in range(8) if page(number).key in ghosts] == [3, 5, 7]


def test_lru_until_the_learnt_order_leads_by_more_than_chance() -> None:
    chooser = Duel(20, BOUNDS)
    for step in range(400):
        hot, scan = page(step % 10, kind=1), [page(1000 + 4 * step + one) for one in range(4)]
        request(chooser, [hot, *scan], SECOND, float(step))
        if step < 3:
            assert not chooser.prefers_learnt
    assert chooser.prefers_learnt


def test_lru_again_when_what_was_learnt_misleads() -> None:
    chooser = Duel(20, BOUNDS)
    for step in range(400):
        request(
            chooser, [page(step % 10, kind=1), *map(page, range(1000 + 4 * step, 1004 + 4 * step))], SECOND, step
        )
    assert chooser.prefers_learnt
    for step in range(400, 2400):
        dead, alive = page(10**6 + step, kind=1), page(2 * 10**6 + step // 4)
        request(chooser, [dead, alive], SECOND, step)
    assert not chooser.prefers_learnt


def test_orders_that_agree_never_change_the_choice() -> None:
    chooser, chance = Duel(10, BOUNDS), random.Random(1)
    for step in range(500):
        request(chooser, [page(chance.randrange(30))], RECENT, float(step))
    assert not chooser.prefers_learnt


def test_a_large_tier_is_sampled() -> None:
    chooser = Duel(100 * duel.GHOSTS, BOUNDS)
    assert 0.98 * duel.GHOSTS <= chooser.size <= duel.GHOSTS
    assert chooser.threshold == pytest.approx(EVERYTHING / 100, rel=0.01)


@settings(max_examples=50, deadline=None)
@given(
    pages=st.integers(1, 60),
    requests=st.lists(st.lists(st.integers(0, 80), min_size=1, max_size=8, unique=True), max_size=60),
)
def test_ghosts_are_bounded_and_agree_with_their_places(pages: int, requests: list[list[int]]) -> None:
    chooser = Duel(pages, BOUNDS)
    for step, numbers in enumerate(requests):
        request(chooser, [page(number, number % 2) for number in numbers], SECOND, float(step))
        for ghosts in (chooser.lru, chooser.learnt):
            assert len(ghosts) <= chooser.size
            assert sum(page(number).key in ghosts for number in range(81)) == len(ghosts)
    assert math.isfinite(chooser._lead)


@settings(max_examples=20, deadline=None)
@given(st.lists(st.integers(0, 40), min_size=1, max_size=200))
def test_the_same_requests_make_the_same_choice(numbers: list[int]) -> None:
    one, other = Duel(8, BOUNDS), Duel(8, BOUNDS)
    for step, number in enumerate(numbers):
        for chooser in (one, other):
            request(chooser, [page(number, number % 2)], SECOND, float(step))
        assert one.prefers_learnt == other.prefers_learnt
        assert one._lead == other._lead
