from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import pytest

from benchmark.client import Round, TurnRecord
from benchmark.workload import WorkloadShape


@pytest.fixture
def shape() -> WorkloadShape:
    return WorkloadShape(
        conversations=5, turns=3, history=100, new=8, output=4, arrival_rate=2.0, think_time_s=0.5
    )


@pytest.fixture
def turn() -> Callable[..., TurnRecord]:
    """A turn of 100 prompt tokens and two output tokens, unless told otherwise."""

    def make(conversation: int = 0, turn: int = 0, **changes: Any) -> TurnRecord:
        values: dict[str, Any] = {
            "prompt_tokens": 100,
            "output_ids": (7, 8),
            "start_s": 0.0,
            "ttft_s": 0.1,
            "e2e_s": 0.3,
            "itl_s": (0.2,),
            "cached": {},
        }
        return TurnRecord(conversation, turn, **{**values, **changes})

    return make


@pytest.fixture
def rounds(turn: Callable[..., TurnRecord]) -> list[Round]:
    """Two rounds of four conversations with three turns, for stock and a faster cached-attention."""
    source = random.Random(1)
    made = []
    for index in range(2):
        for name, seconds, cached in (("stock", 2.0, {}), ("cached-attention", 0.2, {"host": 80, "device": 10})):
            turns = tuple(
                turn(c, t, ttft_s=seconds * (0.9 + 0.2 * source.random()), cached=cached if t else {})
                for c in range(4)
                for t in range(3)
            )
            made.append(Round(name, index, wall_s=seconds * 12, turns=turns))
    return made
