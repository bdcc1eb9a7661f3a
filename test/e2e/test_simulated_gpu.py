"""SGLang's code for GPUs and this package's, on a simulated GPU whose transfers are late at random."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from benchmark.simulated_gpu.environment import GRAPH_FLAGS, SERVER_FLAGS, with_gpu

LATE = 50_000
"""Microseconds at most."""
CHECK_WAITS = "CACHED_ATTENTION_CHECK_WAITS"
TIGHT = ("--max-total-tokens", "1216")
STATES = (*TIGHT, "--max-mamba-cache-size", "16", "--max-running-requests", "3")


@pytest.mark.parametrize(
    ("model", "args", "answered", "known", "conversations", "host_size"),
    [
        ({}, (*SERVER_FLAGS, *TIGHT), (), (30, 6), 4, "6MB"),
        ({}, (*GRAPH_FLAGS, *TIGHT), (), (30, 6), 4, "6MB"),
        ({"architecture": "qwen3.5"}, (*SERVER_FLAGS, *STATES), ("--max-mamba-cache-size", "200"), (6, 3), 3, "3MB"),
        ({"architecture": "mellum"}, (*SERVER_FLAGS, *TIGHT, "--swa-full-tokens-ratio", "0.5"), (), (6, 3), 4, "6MB"),
    ],
    ids=["kv", "graphs", "states", "windows"],
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
    gpu = {"command": True, "env": {**with_gpu(LATE), CHECK_WAITS: "1"}}
    with start(models(**model), *tiers, host_size=host_size, **gpu) as server:
        actual.hold(server, 1)
        # Another one takes the device.
        town(1, history=1_100, seed=1).hold(server, 1)
        actual.hold(server, 1, (3,))
        assert "GB of host memory in" in server.log.read_text(), "it took the device for a CPU"
    assert matches(actual, answers(*answered, conversations=known[0], turns=known[1], **model))
    assert actual.cached("host") + actual.cached("storage") > 250 * conversations
    assert actual.cached("storage") > 0
