from __future__ import annotations

import itertools
import statistics
from dataclasses import replace

import pytest

from benchmark.workload import WorkloadShape, make_workload


def test_same_seed_gives_the_same_conversations(shape: WorkloadShape) -> None:
    assert make_workload(shape, 3, 1, 1_000) == make_workload(shape, 3, 1, 1_000)


@pytest.mark.parametrize(("seed", "round_index"), [(4, 1), (3, 2)])
def test_other_seeds_and_rounds_share_no_conversation(shape: WorkloadShape, seed: int, round_index: int) -> None:
    first = {one.turns[0].tokens for one in make_workload(shape, 3, 1, 1_000)}
    other = {one.turns[0].tokens for one in make_workload(shape, seed, round_index, 1_000)}
    assert len(first) == shape.conversations
    assert not first & other


def test_lengths_and_range_of_tokens(shape: WorkloadShape) -> None:
    for conversation in make_workload(shape, 0, 0, 1_000):
        assert [len(turn.tokens) for turn in conversation.turns] == [108, 8, 8]
        assert all(250 <= token < 750 for turn in conversation.turns for token in turn.tokens)
    assert shape.tokens_per_conversation == 100 + 3 * (8 + 4)
    assert shape.total_turns == 15


def test_arrivals_are_poisson_with_the_given_rate(shape: WorkloadShape) -> None:
    arrivals = [one.arrival_s for one in make_workload(replace(shape, conversations=2_000), 0, 0, 1_000)]
    gaps = [after - before for before, after in itertools.pairwise(arrivals)]
    assert arrivals[0] == 0.0
    assert statistics.mean(gaps) == pytest.approx(0.5, rel=0.1)
    assert statistics.stdev(gaps) == pytest.approx(0.5, rel=0.15)


def test_think_times_precede_returning_turns_only(shape: WorkloadShape) -> None:
    many = make_workload(replace(shape, conversations=1_000), 0, 0, 1_000)
    assert {one.turns[0].think_s for one in many} == {0.0}
    assert statistics.mean(turn.think_s for one in many for turn in one.turns[1:]) == pytest.approx(0.5, rel=0.1)


def test_rate_and_think_time_of_zero_mean_no_waiting(shape: WorkloadShape) -> None:
    for conversation in make_workload(replace(shape, arrival_rate=0.0, think_time_s=0.0), 0, 0, 1_000):
        assert conversation.arrival_s == 0.0
        assert all(turn.think_s == 0.0 for turn in conversation.turns)


@pytest.mark.parametrize("change", [{"turns": 0}, {"new": 0}, {"history": -1}, {"think_time_s": -0.1}])
def test_impossible_shapes_are_refused(shape: WorkloadShape, change: dict[str, int]) -> None:
    with pytest.raises(ValueError, match=next(iter(change))):
        replace(shape, **change)
