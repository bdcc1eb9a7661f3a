"""SGLang's code for GPUs and this package's, on a simulated GPU whose transfers are late at random."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from benchmark.simulated_gpu.environment import GRAPH_FLAGS, SERVER_FLAGS, with_gpu

LATE = 50_000
"""Microseconds at most."""
CHECK_WAITS = "CACHED_ATTENTION_CHECK_WAITS"
TIGHT = ("--max-total-tokens", "1216")
STATES = (*TIGHT, "--max-mamba-cache-size", "16", "--max-running-requests", "3")


def late_gpu() -> dict[str, Any]:
    return {"command": True, "env": {**with_gpu(LATE), CHECK_WAITS: "1"}}


@pytest.mark.parametrize(
    ("model", "args", "answered", "known", "conversations", "host_size"),
    [
        ({}, (*SERVER_FLAGS, *TIGHT), (), (30, 6), 4, "6MB"),
        (
            {"architecture": "qwen3.5"},
            (*SERVER_FLAGS, *STATES),
            ("--max-mamba-cache-size", "200"),
            (6, 3),
            3,
            "3MB",
        ),
        (
            {"architecture": "mellum"},
            (*SERVER_FLAGS, *TIGHT, "--swa-full-tokens-ratio", "0.5"),
            (),
            (6, 3),
            4,
            "6MB",
        ),
    ],
    ids=["kv", "states", "windows"],
)
def test_a_gpu_answers_what_is_answered_without_a_cache(
    models: Any,
    start: Any,
    town: Any,
    answers: Any,
    matches: Any,
    disk_tier: Any,
    tmp_path: Path,
    model: dict[str, str],
    args: tuple[str, ...],
    answered: tuple[str, ...],
    known: tuple[int, int],
    conversations: int,
    host_size: str,
) -> None:
    actual, tiers = town(conversations), (*args, *disk_tier(tmp_path, "200MB"))
    with start(models(**model), *tiers, host_size=host_size, **late_gpu()) as server:
        actual.hold(server, 1)
        # Another one takes the device.
        town(1, history=1_100, seed=1).hold(server, 1)
        actual.hold(server, 1, (3,))
        assert "GB of host memory in" in server.log.read_text(), "it took the device for a CPU"
    assert matches(actual, answers(*answered, conversations=known[0], turns=known[1], **model))
    assert actual.cached("host") + actual.cached("storage") > 250 * conversations
    assert actual.cached("storage") > 0


def test_loads_start_while_decode_steps_run_in_cuda_graphs(
    models: Any, start: Any, town: Any, answers: Any, matches: Any, disk_tier: Any, tmp_path: Path
) -> None:
    actual, endless = town(4), town(1, history=200, seed=7)
    tiers = ("--max-total-tokens", "1856", *disk_tier(tmp_path, "200MB"))
    with start(models(), *GRAPH_FLAGS, *tiers, host_size="6MB", **late_gpu()) as server:
        (writer,) = endless.conversations
        with ThreadPoolExecutor(1) as pool:
            written = [pool.submit(writer.turn, server, 5, 60) for _ in range(6)]
            actual.hold(server, 5, (1, 2))
        for turn in written:
            turn.result()
        assert "cuda graph: True" in server.log.read_text(), "no prefill ran in a graph"
    assert matches(actual, answers(conversations=30, turns=6))
    assert actual.cached("host") > 0
    assert actual.cached("storage") > 0
