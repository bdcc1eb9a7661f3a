"""A model with gated delta nets: its states come back with its KV, and the answers are the same."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from benchmark.server import Server

MODEL = {"architecture": "qwen3.5"}
PLENTY = ("--max-mamba-cache-size", "200")
TIGHT = ("--max-total-tokens", "1600", "--max-mamba-cache-size", "16", "--max-running-requests", "3")
"""States of the running requests, and few besides."""
SHARED = 512
"""Tokens that prompts of a fleet have in common."""
PAGE = 64


def states_of(server: Server, store_states: Any) -> dict[str, Any]:
    return store_states(server)[0]["states"]


def test_states_come_back_from_host_memory_disk_and_after_a_restart(
    models: Any,
    start: Any,
    town: Any,
    answers: Any,
    matches: Any,
    disk_tier: Any,
    store_states: Any,
    settled: Any,
    tmp_path: Path,
) -> None:
    actual, model = town(6), models(**MODEL)
    tiers = (*TIGHT, *disk_tier(tmp_path, "200MB"))
    # Host memory for a third of the pages and states: the others come from disk.
    with start(model, *tiers, host_size="3MB") as server:
        actual.hold(server, 2, (1, 3))
        settled(server)
        before = states_of(server, store_states)
    with start(model, *tiers, host_size="3MB") as server:
        actual.hold(server, 1, (2,))
        after = states_of(server, store_states)
    assert matches(actual, answers(*PLENTY, conversations=6, turns=3, **MODEL))
    assert actual.cached("storage") > 2_000
    assert actual.cached("device") + actual.cached("host") + actual.cached("storage") > 4_000
    assert before["loaded"] >= 4
    assert before["saved"] >= 10
    assert not before["failed"]
    assert after["disk_pages_used"] >= before["disk_pages_used"] > before["host_pages"]
    assert after["loaded"] >= 6
    assert after["fetched"] >= 6
    assert sorted(path.name for path in tmp_path.iterdir()) == ["dp0-pp0-tp0", "dp0-pp0-tp0-states"]


def test_prompts_that_share_a_beginning_find_the_state_at_its_end(
    models: Any, start: Any, town: Any, settled: Any
) -> None:
    model = models(**MODEL)
    talks = [town(1, seed=seed).conversations[0] for seed in range(20, 26)]
    for fleet in (talks[:3], talks[3:]):
        beginning = fleet[0].words(SHARED)
        for talk in fleet:
            talk.tokens = [*beginning, *talk.tokens]
    with start(model, *TIGHT, host_size="60MB") as server:
        for fleet, leaves_device in ((talks[:3], False), (talks[3:], True)):
            first, second, third = fleet
            first.turn(server, 40, 16)
            if leaves_device:
                settled(server)
                town(4, seed=9).hold(server, 1)
            # Where the two part there is no state yet: this one leaves one.
            second.turn(server, 40, 16)
            assert second.cached == [{"device": 0, "host": 0, "storage": 0}]
            settled(server)
            town(4, seed=10 + leaves_device).hold(server, 1)
            third.turn(server, 40, 16)
            assert third.cached[0]["host"] == SHARED
    with start(model, *PLENTY) as server:
        for talk in (talks[2], talks[5]):
            assert talk.answers == [server.generate(talk.tokens[:-16], 16)["output_ids"]]


def test_ranks_agree_on_where_to_go_on_from(
    models: Any, start: Any, town: Any, answers: Any, matches: Any
) -> None:
    actual, model, two = town(6), models(**MODEL), ("--tp-size", "2")
    with start(model, *TIGHT, *two, host_size="60MB") as server:
        actual.hold(server, 3, (1, 2, 3))
    assert matches(actual, answers(*PLENTY, *two, conversations=6, turns=3, **MODEL))
    assert actual.cached("host") > 4_000
