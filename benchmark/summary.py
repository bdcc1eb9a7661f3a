"""Statistics of a benchmark's records: latencies, throughput, origin of tokens, agreement of outputs."""

from __future__ import annotations

import itertools
import statistics
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from benchmark.client import Round, TurnRecord

COMPUTED = "computed"


@dataclass(frozen=True)
class Latency:
    """Mean and percentiles of durations, in seconds; all NaN if there are none."""

    mean: float
    p50: float
    p99: float

    @classmethod
    def of(cls, seconds: Iterable[float]) -> Latency:
        values = np.fromiter(seconds, dtype=np.float64)
        if not values.size:
            return cls(float("nan"), float("nan"), float("nan"))
        return cls(float(values.mean()), *(float(p) for p in np.percentile(values, (50, 99))))


@dataclass(frozen=True)
class Summary:
    """One configuration. Throughput in tokens per second of wall time, over all turns and rounds.

    `origin` is the share of the prompt tokens of the measured turns by tier, "computed" being the rest.
    """

    configuration: str
    turns: int
    ttft: Latency
    first_turn_ttft: Latency
    e2e: Latency
    itl: Latency
    input_throughput: float
    output_throughput: float
    origin: dict[str, float]


@dataclass(frozen=True)
class Mismatch:
    """A turn with the same prompt as the reference's but another answer, from token `position` on."""

    configuration: str
    round: int
    conversation: int
    turn: int
    position: int


@dataclass(frozen=True)
class Agreement:
    """Answers of one configuration compared with the reference's, on equal prompts."""

    configuration: str
    compared: int
    mismatches: tuple[Mismatch, ...]


def summarise(rounds: Sequence[Round], first_measured_turn: int = 1) -> Summary:
    """Summary of the rounds of one configuration; latencies are those of turns from `first_measured_turn` on."""
    turns = [turn for one in rounds for turn in one.turns]
    measured = [turn for turn in turns if turn.turn >= first_measured_turn]
    wall = sum(one.wall_s for one in rounds)
    return Summary(
        configuration=rounds[0].configuration,
        turns=len(measured),
        ttft=Latency.of(turn.ttft_s for turn in measured),
        first_turn_ttft=Latency.of(turn.ttft_s for turn in turns if turn.turn == 0),
        e2e=Latency.of(turn.e2e_s for turn in measured),
        itl=Latency.of(gap for turn in measured for gap in turn.itl_s),
        input_throughput=sum(turn.prompt_tokens for turn in turns) / wall,
        output_throughput=sum(len(turn.output_ids) for turn in turns) / wall,
        origin=origin(measured),
    )


def origin(turns: Sequence[TurnRecord]) -> dict[str, float]:
    """Share of the prompt tokens by the tier they came from, and "computed"; empty without turns."""
    tokens: Counter[str] = Counter()
    for turn in turns:
        tokens.update(turn.cached)
        tokens[COMPUTED] += turn.prompt_tokens - sum(turn.cached.values())
    total = sum(tokens.values())
    return {tier: count / total for tier, count in tokens.items()} if total else {}


def by_configuration(rounds: Iterable[Round]) -> dict[str, list[Round]]:
    """Rounds of each configuration, in the order in which the configurations first appear."""
    groups: dict[str, list[Round]] = {}
    for one in rounds:
        groups.setdefault(one.configuration, []).append(one)
    return groups


def agreement(rounds: Sequence[Round], reference: Sequence[Round]) -> Agreement:
    """Compare the rounds of one configuration with the same rounds of the reference.

    A conversation is compared up to its first mismatch: after it the prompts differ.
    """
    expected = {(one.index, turn.conversation, turn.turn): turn for one in reference for turn in one.turns}
    compared = 0
    mismatches = []
    for one in rounds:
        ordered = sorted(one.turns, key=lambda turn: (turn.conversation, turn.turn))
        for _, turns in itertools.groupby(ordered, key=lambda turn: turn.conversation):
            for turn in turns:
                compared += 1
                other = expected[one.index, turn.conversation, turn.turn]
                if turn.output_ids != other.output_ids:
                    position = first_difference(turn.output_ids, other.output_ids)
                    where = (one.configuration, one.index, turn.conversation, turn.turn)
                    mismatches.append(Mismatch(*where, position))
                    break
    return Agreement(rounds[0].configuration, compared, tuple(mismatches))


def first_difference(left: Sequence[int], right: Sequence[int]) -> int:
    """Index of the first element in which the two differ; the shorter length if one begins with the other."""
    pairs = zip(left, right, strict=False)
    return next((i for i, (a, b) in enumerate(pairs) if a != b), min(len(left), len(right)))


def total_throughput(one: Round) -> float:
    """Prompt and output tokens per second of the wall time of a round."""
    tokens = sum(turn.prompt_tokens + len(turn.output_ids) for turn in one.turns)
    return tokens / one.wall_s


def paired_ratios(rounds: Sequence[Round], reference: Sequence[Round]) -> list[float]:
    """Throughput of each round relative to the reference's round with the same index."""
    expected = {one.index: total_throughput(one) for one in reference}
    return [total_throughput(one) / expected[one.index] for one in rounds]


def median_throughput(rounds: Sequence[Round]) -> float:
    """Median throughput over the rounds, in tokens per second."""
    return statistics.median(total_throughput(one) for one in rounds)
