"""A server with a tiny device pool and a host tier answers what a server with a huge device pool answers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest


def tight(tokens: int) -> tuple[str, ...]:
    return ("--max-total-tokens", str(tokens))


def test_thirty_conversations_of_five_turns(
    models: Any, start: Any, town: Any, answers: Any, matches: Any
) -> None:
    actual = town(30)
    # Two of the longest conversations fit: 400 + 29 * 37 + 5 * (40 + 16) tokens each.
    with start(models(), *tight(3520), host_size="600MB") as server:
        actual.hold(server, 5, (1, 4, 2, 3))
    assert matches(actual, answers(conversations=30, turns=6))
    assert actual.cached("host") > 80_000
    assert actual.cached("device") < actual.cached("host")


@pytest.mark.parametrize(
    ("architecture", "dtype", "args", "known"),
    [
        ("llama", "bfloat16", ("--disable-overlap-schedule",), (6, 3)),
        ("deepseek-mla", "float32", (), (6, 3)),
        ("gemma3", "float32", ("--kv-cache-dtype", "fp8_e4m3"), (6, 3)),
        ("llama", "float32", ("--tp-size", "2"), (12, 6)),
    ],
    ids=["bfloat16-no-overlap", "mla", "sliding-windows-fp8", "tp2"],
)
def test_other_ways_to_run(
    models: Any,
    start: Any,
    town: Any,
    answers: Any,
    matches: Any,
    architecture: str,
    dtype: str,
    args: tuple[str, ...],
    known: tuple[int, int],
) -> None:
    model = (
        {"architecture": architecture, "dtype": dtype} if (architecture, dtype) != ("llama", "float32") else {}
    )
    actual = town(6)
    with start(models(**model), *tight(1216), *args, host_size="200MB") as server:
        actual.hold(server, 3)
    assert matches(actual, answers(*args, conversations=known[0], turns=known[1], **model))
    assert actual.cached("host") > 4_000


def test_ranks_that_hold_equal_pages_keep_one_copy(
    models: Any,
    start: Any,
    town: Any,
    answers: Any,
    matches: Any,
    disk_tier: Any,
    store_states: Any,
    tmp_path: Path,
) -> None:
    model, two = {"architecture": "deepseek-mla", "dtype": "float32"}, ("--tp-size", "2")
    one_copy = (*two, "--cached-attention-mla-dedup", *disk_tier(tmp_path, "100MB"))
    actual = town(6)
    # Host memory for about half of the pages: the others come from disk.
    with start(models(**model), *tight(1216), *one_copy, host_size="6MB") as server:
        actual.hold(server, 3, (1, 2))
        (state,) = store_states(server)
    assert matches(actual, answers(*two, conversations=6, turns=3, **model))
    assert actual.cached("host") + actual.cached("storage") > 4_000
    assert actual.cached("storage") > 1_000
    assert state["host_pages"] == 6_000_000 // state["page_bytes"]
    assert [path.name for path in tmp_path.iterdir() if path.is_dir()] == ["dp0-pp0-tp0"]


def test_attention_in_parallel_replicas(
    models: Any,
    start: Any,
    town: Any,
    answers: Any,
    matches: Any,
    disk_tier: Any,
    store_states: Any,
    tmp_path: Path,
) -> None:
    """DP attention: each rank has conversations of its own, but all compute every layer together."""
    model = {"architecture": "deepseek-mla", "dtype": "float32"}
    two = ("--tp-size", "2", "--dp-size", "2", "--enable-dp-attention")
    ours, actual = (*two, *disk_tier(tmp_path, "100MB")), town(6)
    # Host memory for less than half of the pages: the others come from disk.
    with start(models(**model), *tight(1216), *ours, host_size="8MB") as server:
        actual.hold(server, 2, (1, 2), replicas=2)
        states = store_states(server)
    with start(models(**model), *tight(1216), *ours, host_size="8MB") as server:
        actual.hold(server, 1, (2,), replicas=2)
    assert matches(actual, answers(*two, conversations=6, turns=3, **model))
    assert [state["host_pages"] for state in states] == [4_000_000 // states[0]["page_bytes"]] * 2
    assert actual.cached("host") + actual.cached("storage") > 4_000
    assert sum(talk.cached[-1]["storage"] for talk in actual.conversations) > 2_000
    assert sorted(path.name for path in tmp_path.iterdir() if path.is_dir()) == ["dp0-pp0-tp0", "dp1-pp0-tp1"]
