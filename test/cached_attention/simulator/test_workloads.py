from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

from cached_attention.simulator.conversations import Conversations, Shape
from cached_attention.simulator.trace import TraceError, read_trace


def test_generated_sessions_are_those_of_the_paper() -> None:
    workload = Conversations(Shape(sessions=4000, context=1 << 20), page_tokens=64)
    turns: dict[str, int] = {}
    tokens: dict[str, int] = {}
    while (when := workload.next_arrival()) < math.inf:
        request = workload.due(when, 0)
        assert request is not None
        assert request.prompt_pages == request.prompt // 64
        session = request.name.split("-")[0]
        turns[session] = turns.get(session, 0) + 1
        tokens[session] = request.prompt + request.output
        workload.answered(request, when)
    assert sum(turns.values()) == len(workload)
    assert sum(turns.values()) / 4000 == pytest.approx(5.75, rel=0.05)
    assert sum(one > 1 for one in turns.values()) / 4000 == pytest.approx(0.73, abs=0.02)
    assert sum(one > 2048 for one in tokens.values()) / 4000 == pytest.approx(0.47, abs=0.02)
    assert sum(one > 4096 for one in tokens.values()) / 4000 == pytest.approx(0.30, abs=0.02)


def test_what_exceeds_the_context_window_drops_half_of_the_history() -> None:
    workload = Conversations(Shape(sessions=50, context=1024), page_tokens=64)
    truncated = 0
    last: dict[str, tuple[bytes, ...]] = {}
    while (when := workload.next_arrival()) < math.inf:
        request = workload.due(when, 0)
        assert request is not None
        assert request.prompt + request.output <= 1024
        session = request.name.split("-")[0]
        history = request.keys[: request.history // 64]
        assert history == last.get(session, ())[: len(history)]
        truncated += len(history) < len(last.get(session, ()))
        last[session] = request.keys
        workload.answered(request, when)
    assert truncated


def test_a_trace_is_read_as_it_is(tmp_path: Path) -> None:
    path = tmp_path / "trace.jsonl"
    fields = {"timestamp": 1500, "input_length": 600, "output_length": 7, "hash_ids": [4, 9]}
    path.write_text(json.dumps(fields) + "\n")
    (request,) = read_trace(path)
    assert (request.arrival, request.prompt, request.output, request.prompt_pages) == (1.5, 600, 7, 2)
    assert len(set(request.keys)) == 2


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        (["{"], "line 1"),
        (['{"timestamp": 0}'], "hash_ids"),
        (
            [
                f'{{"timestamp": {when}, "input_length": 1, "output_length": 1, "hash_ids": [1]}}'
                for when in (5, 4)
            ],
            "sort by timestamp",
        ),
    ],
)
def test_a_bad_trace_is_refused(tmp_path: Path, lines: list[str], message: str) -> None:
    path = tmp_path / "trace.jsonl"
    path.write_text("\n".join(lines))
    with pytest.raises(TraceError, match=message):
        read_trace(path)
