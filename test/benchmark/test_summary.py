from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

import pytest

from benchmark.client import Round, TurnRecord, cached_by_tier
from benchmark.summary import (
    Latency,
    agreement,
    by_configuration,
    first_difference,
    origin,
    paired_ratios,
    summarise,
    total_throughput,
)


def test_latency_of_known_values() -> None:
    latency = Latency.of(range(1, 101))
    assert (latency.mean, latency.p50, latency.p99) == pytest.approx((50.5, 50.5, 99.01))


def test_latency_of_nothing_is_not_a_number() -> None:
    assert math.isnan(Latency.of([]).mean)


def test_only_returning_turns_count_for_latency_and_all_for_throughput(
    turn: Callable[..., TurnRecord],
) -> None:
    first = turn(0, 0, ttft_s=9.0, prompt_tokens=100, output_ids=(1, 2))
    second = turn(0, 1, ttft_s=1.0, prompt_tokens=140, output_ids=(3, 4, 5), itl_s=(0.1, 0.3))
    summary = summarise([Round("server", 0, 10.0, (first, second))])
    assert (summary.turns, summary.ttft.mean, summary.first_turn_ttft.mean) == (1, 1.0, 9.0)
    assert summary.itl.mean == pytest.approx(0.2)
    assert summary.input_throughput == pytest.approx(24.0)
    assert summary.output_throughput == pytest.approx(0.5)


def test_throughput_divides_by_the_time_of_all_rounds(turn: Callable[..., TurnRecord]) -> None:
    rounds = [Round("server", i, wall, (turn(0, 0),)) for i, wall in enumerate((1.0, 3.0))]
    assert summarise(rounds, first_measured_turn=0).input_throughput == pytest.approx(50.0)


def test_origin_is_a_share_by_tier(turn: Callable[..., TurnRecord]) -> None:
    turns = [turn(cached={"device": 20, "host": 60}), turn(cached={"host": 40})]
    assert origin(turns) == pytest.approx({"device": 0.1, "host": 0.5, "computed": 0.4})
    assert origin([]) == {}


@pytest.mark.parametrize(
    ("meta", "expected"),
    [
        ({"cached_tokens": 5, "cached_tokens_details": {"device": 2, "host": 3}}, {"device": 2, "host": 3}),
        (
            {"cached_tokens": 5, "cached_tokens_details": {"device": 5, "host": 0, "storage_backend": "x"}},
            {"device": 5},
        ),
        ({"cached_tokens": 5, "cached_tokens_details": None}, {"device": 5}),
        ({"cached_tokens": 0}, {}),
    ],
)
def test_cached_tokens_by_tier(meta: dict[str, object], expected: dict[str, int]) -> None:
    assert cached_by_tier(meta) == expected


def test_equal_answers_agree(rounds: list[Round]) -> None:
    groups = by_configuration(rounds)
    assert list(groups) == ["stock", "cached-attention"]
    result = agreement(groups["cached-attention"], groups["stock"])
    assert (result.compared, result.mismatches) == (24, ())


def test_a_conversation_is_compared_up_to_its_first_mismatch(rounds: list[Round]) -> None:
    groups = by_configuration(rounds)
    broken = [
        replace(turn, output_ids=(7, 9)) if (turn.conversation, turn.turn) in {(2, 1), (2, 2)} else turn
        for turn in groups["cached-attention"][1].turns
    ]
    group = [groups["cached-attention"][0], replace(groups["cached-attention"][1], turns=tuple(broken))]
    result = agreement(group, groups["stock"])
    assert result.compared == 23
    (miss,) = result.mismatches
    assert (miss.round, miss.conversation, miss.turn, miss.position) == (1, 2, 1, 1)


@pytest.mark.parametrize(
    ("left", "right", "position"), [((1, 2, 3), (1, 5, 3), 1), ((1, 2), (1, 2, 3), 2), ((), (4,), 0)]
)
def test_first_difference(left: tuple[int, ...], right: tuple[int, ...], position: int) -> None:
    assert first_difference(left, right) == position


def test_ratios_pair_rounds_by_index(turn: Callable[..., TurnRecord]) -> None:
    def made(name: str, index: int, wall: float) -> Round:
        return Round(name, index, wall, (turn(),))

    reference = [made("stock", 0, 1.0), made("stock", 1, 4.0)]
    other = [made("cached-attention", 1, 2.0), made("cached-attention", 0, 1.0)]
    assert paired_ratios(other, reference) == pytest.approx([2.0, 1.0])
    assert total_throughput(reference[0]) == pytest.approx(102.0)
