"""Learning how long fetching and computing take, and when to wait."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cached_attention.policy.waiting import CEILING, TOLERATED, Outstanding, Pace, WaitOrRecompute

MB = 10**6


@pytest.mark.parametrize(("latency", "rate"), [(0.2, 1e9), (0.0, 5e8), (1e-4, 3e9), (2.0, 1e7)])
def test_a_pace_is_learnt_from_a_few_observations(latency: float, rate: float) -> None:
    pace = Pace(latency=1e-4, rate=2e9)
    for round_ in range(40):
        amount = (1 + round_ % 4) * 100 * MB
        pace.observe(amount, latency + amount / rate)
    assert pace.seconds(250 * MB) == pytest.approx(latency + 250 * MB / rate, rel=0.1)


@given(st.floats(1e3, 1e9), st.floats(1e-3, 100), st.integers(3, 10))
def test_a_single_amount_says_what_others_take_in_the_prior_s_proportions(
    amount: float, seconds: float, times: int
) -> None:
    prior, pace = Pace(latency=1e-4, rate=2e9), Pace(latency=1e-4, rate=2e9)
    for _ in range(times):
        pace.observe(amount, seconds)
    assert pace.seconds(amount) == pytest.approx(seconds)
    factor = seconds / prior.seconds(amount)
    assert pace.seconds(3 * amount) == pytest.approx(factor * prior.seconds(3 * amount))


def test_one_look_at_a_slow_disk_is_enough() -> None:
    decision = learnt(fetch_s=0.01, compute_s=1.0)
    decision.fetching = Pace(latency=1e-4, rate=2e9)
    assert decision.is_worth_waiting(outstanding())
    decision.fetching.observe(100 * MB, 1.5)
    assert not decision.is_worth_waiting(outstanding())


def test_a_slow_computer_is_known_after_two_turns() -> None:
    """A history that is computed, and a turn that goes on with it: what is seen of one conversation."""
    pace = Pace(latency=0.02, rate=1e4)
    pace.observe(2048, 1.9)
    pace.observe(100, 0.15)
    assert pace.seconds(2048) == pytest.approx(1.9, rel=0.1)


def test_a_pace_follows_a_disk_that_slows_down_and_recovers() -> None:
    pace = Pace(latency=1e-4, rate=2e9)
    for seconds in (0.05, 5.0, 0.05):
        for _ in range(100):
            pace.observe(100 * MB, seconds)
        assert pace.seconds(100 * MB) == pytest.approx(seconds, rel=0.1)


@given(
    st.lists(st.tuples(st.floats(0, 1e10), st.floats(0, 100)), max_size=20),
    st.floats(0, 1e10),
    st.floats(0, 1e10),
)
def test_an_estimate_is_never_negative_and_never_falls_with_the_amount(
    seen: list[tuple[float, float]], less: float, more: float
) -> None:
    pace = Pace(latency=1e-4, rate=2e9)
    for amount, seconds in seen:
        pace.observe(amount, seconds)
    less, more = sorted((less, more))
    assert 0 <= pace.seconds(less) <= pace.seconds(more)


def outstanding(
    waited: float = 0.0, mb: float = 100, ahead_mb: float = 0, tokens: int = 2048, held: float | None = None
) -> Outstanding:
    """`held` as long as `waited` unless given."""
    return Outstanding(waited, waited if held is None else held, int(mb * MB), int(ahead_mb * MB), tokens)


def learnt(fetch_s: float, compute_s: float) -> WaitOrRecompute:
    """A server that takes `fetch_s` for 100 MB and `compute_s` for 2,048 tokens, and in proportion for others."""
    decision = WaitOrRecompute()
    for step in range(100):
        share = 0.5 + step % 3 / 2
        decision.fetching.observe(share * 100 * MB, share * fetch_s)
        decision.computing.observe(share * 2048, share * compute_s)
    return decision


def test_what_is_quicker_is_done() -> None:
    assert learnt(fetch_s=0.1, compute_s=1.0).is_worth_waiting(outstanding())
    assert not learnt(fetch_s=1.0, compute_s=0.1).is_worth_waiting(outstanding())


def test_a_queue_before_the_disk_counts() -> None:
    decision = learnt(fetch_s=0.5, compute_s=1.0)
    assert decision.is_worth_waiting(outstanding())
    assert not decision.is_worth_waiting(outstanding(ahead_mb=400))


def test_a_fetch_that_is_nearly_done_is_waited_for() -> None:
    decision = learnt(fetch_s=1.0, compute_s=0.5)
    assert not decision.is_worth_waiting(outstanding(waited=0.0))
    assert decision.is_worth_waiting(outstanding(waited=0.8))


def test_a_fetch_that_is_overdue_is_not() -> None:
    decision = learnt(fetch_s=0.2, compute_s=1.0)
    assert decision.is_worth_waiting(outstanding(waited=0.3))
    assert not decision.is_worth_waiting(outstanding(waited=0.5))


def test_an_unknown_disk_costs_little_of_the_recompute_time_at_most() -> None:
    decision = WaitOrRecompute()
    for _ in range(100):
        decision.computing.observe(2048, 10.0)
    waited = 0.0
    while decision.is_worth_waiting(outstanding(waited=waited, mb=1)):
        waited += 0.01
    assert waited <= TOLERATED * decision.computing.seconds(2048) + 0.02


def test_nobody_waits_longer_than_the_ceiling() -> None:
    decision = learnt(fetch_s=100.0, compute_s=1000.0)
    assert decision.is_worth_waiting(outstanding(waited=CEILING - 0.1))
    assert not decision.is_worth_waiting(outstanding(waited=CEILING))


def test_whoever_always_waits_waits_up_to_the_ceiling() -> None:
    decision = WaitOrRecompute(always=True)
    for _ in range(20):
        decision.fetching.observe(100 * MB, 60.0)
    late = outstanding(CEILING - 0.01, tokens=64)
    assert decision.is_worth_waiting(late)
    assert not decision.is_worth_waiting(replace(late, held=CEILING))


@pytest.mark.parametrize("always", [False, True])
def test_the_ceiling_counts_from_when_a_request_could_have_run(always: bool) -> None:
    """What it spent in the queue, while its fetch went on, it would have spent there anyway."""
    decision = learnt(fetch_s=100.0, compute_s=1000.0)
    if always:
        decision = WaitOrRecompute(always=True)
    assert decision.is_worth_waiting(outstanding(waited=3 * CEILING, held=0.0))
