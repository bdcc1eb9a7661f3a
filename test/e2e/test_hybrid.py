"""Models that are not all full attention: what their other layers need comes back with the KV."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from benchmark.mooncake import Master
from benchmark.server import Server


class Kind(NamedTuple):
    """A model, and how much its server has."""

    architecture: str
    what: str
    """Beside the KV."""
    plenty: tuple[str, ...]
    tight: tuple[str, ...]

    @property
    def model(self) -> dict[str, str]:
        return {"architecture": self.architecture}


STATES = Kind(
    "qwen3.5",
    "states",
    ("--max-mamba-cache-size", "200"),
    # States of the running requests, and few besides.
    ("--max-total-tokens", "1600", "--max-mamba-cache-size", "16", "--max-running-requests", "3"),
)
WINDOWS = Kind("mellum", "windows", (), ("--max-total-tokens", "1600", "--swa-full-tokens-ratio", "0.5"))
SHARED = 512
"""Tokens that prompts of a fleet have in common."""
PAGE = 64
TIERS = ("device", "host", "storage")


@pytest.mark.parametrize(
    ("kind", "found", "saved", "loaded", "fetched"),
    [
        (STATES, 4_000, 10, range(4, 1_000), range(6, 1_000)),
        # Of each conversation the last pages, not all.
        (WINDOWS, 5_000, 12, range(12, 19), range(12, 19)),
    ],
    ids=["states", "windows"],
)
def test_all_comes_back_from_host_memory_disk_and_after_a_restart(
    models: Any,
    start: Any,
    town: Any,
    answers: Any,
    matches: Any,
    disk_tier: Any,
    store_states: Any,
    settled: Any,
    tmp_path: Path,
    kind: Kind,
    found: int,
    saved: int,
    loaded: range,
    fetched: range,
) -> None:
    actual, model = town(6), models(**kind.model)

    def beside_the_kv(server: Server) -> dict[str, Any]:
        return store_states(server)[0][kind.what]

    tiers = (*kind.tight, *disk_tier(tmp_path, "200MB"))
    # Host memory for a third of the pages: the others come from disk.
    with start(model, *tiers, host_size="3MB") as server:
        actual.hold(server, 2, (1, 3))
        settled(server)
        before = beside_the_kv(server)
    with start(model, *tiers, host_size="3MB") as server:
        actual.hold(server, 1, (2,))
        after = beside_the_kv(server)
    assert matches(actual, answers(*kind.plenty, conversations=6, turns=3, **kind.model))
    assert actual.cached("storage") > 2_000
    assert actual.cached("device") + actual.cached("host") + actual.cached("storage") > found
    assert before["loaded"] in loaded
    assert before["saved"] >= saved
    assert not before["failed"]
    assert after["disk_pages_used"] >= before["disk_pages_used"] > before["host_pages"]
    assert after["loaded"] >= 6
    assert after["fetched"] in fetched
    directories = sorted(path.name for path in tmp_path.iterdir() if path.is_dir())
    assert directories == ["dp0-pp0-tp0", f"dp0-pp0-tp0-{kind.what}"]


@pytest.mark.parametrize(
    ("kind", "ranks"), [(STATES, ()), (WINDOWS, ("--tp-size", "2"))], ids=["states", "windows on two ranks"]
)
def test_conversations_move_between_servers(
    master: Master,
    models: Any,
    start: Any,
    town: Any,
    answers: Any,
    matches: Any,
    store_states: Any,
    kind: Kind,
    ranks: tuple[str, ...],
) -> None:
    actual, model = town(4), models(**kind.model)
    remote = ("--cached-attention-remote", master.url("256MB"), "--cached-attention-wait", "complete")

    def is_shared(server: Server) -> bool:
        states = [part for state in store_states(server) for part in (state, state[kind.what])]
        return all(state["remote_healthy"] and not state["remote_unshared"] for state in states)

    def wait_until_shared(server: Server) -> None:
        deadline = time.monotonic() + 60
        while not is_shared(server):
            assert time.monotonic() < deadline, store_states(server)
            time.sleep(0.1)

    args = (*kind.tight, *remote, *ranks)
    with start(model, *args, host_size="80MB") as a, start(model, *args, host_size="80MB") as b:
        for server in (a, b):
            wait_until_shared(server)
        actual.hold(a, 1)
        wait_until_shared(a)
        actual.hold(b, 1, (2,))
        moved = actual.cached("storage")
        wait_until_shared(b)
        actual.hold(a, 1, (2,))
    assert matches(actual, answers(*kind.plenty, *ranks, conversations=6, turns=3, **kind.model))
    assert moved > 4 * 384, "B does not find what A computed"
    back = sum(conversation.cached[2][tier] for conversation in actual.conversations for tier in TIERS)
    assert back > moved, "A does not find what B computed"
    assert actual.cached("storage") > moved


@pytest.mark.parametrize(
    ("kind", "args", "found"),
    [(STATES, (), 4_000), (WINDOWS, ("--chunked-prefill-size", "256"), 5_000)],
    ids=["states", "windows"],
)
def test_ranks_agree_on_where_to_go_on_from(
    models: Any,
    start: Any,
    town: Any,
    answers: Any,
    matches: Any,
    kind: Kind,
    args: tuple[str, ...],
    found: int,
) -> None:
    actual, model, two = town(6), models(**kind.model), ("--tp-size", "2")
    with start(model, *kind.tight, *two, *args, host_size="60MB") as server:
        actual.hold(server, 3, (1, 2, 3))
    assert matches(actual, answers(*kind.plenty, *two, conversations=6, turns=3, **kind.model))
    assert actual.cached("host") > found


@pytest.mark.parametrize("kind", [STATES, WINDOWS], ids=["states", "windows"])
def test_prompts_that_share_a_beginning_go_on_from_its_end(
    models: Any, start: Any, town: Any, settled: Any, kind: Kind
) -> None:
    model = models(**kind.model)
    talks = [town(1, seed=seed).conversations[0] for seed in range(20, 26)]
    for fleet in (talks[:3], talks[3:]):
        beginning = fleet[0].words(SHARED)
        for talk in fleet:
            talk.tokens = [*beginning, *talk.tokens]
    with start(model, *kind.tight, host_size="60MB") as server:
        for fleet, leaves_device in ((talks[:3], False), (talks[3:], True)):
            first, second, third = fleet
            first.turn(server, 40, 16)
            if leaves_device:
                settled(server)
                town(4, seed=9).hold(server, 1)
            # Where the two part nothing was left yet: this one leaves it.
            second.turn(server, 40, 16)
            assert second.cached == [{"device": 0, "host": 0, "storage": 0}]
            settled(server)
            town(4, seed=10 + leaves_device).hold(server, 1)
            third.turn(server, 40, 16)
            assert third.cached[0]["host"] == SHARED
    with start(model, *kind.plenty) as server:
        for talk in (talks[2], talks[5]):
            assert talk.answers == [server.generate(talk.tokens[:-16], 16)["output_ids"]]


def test_a_long_answer_is_gone_on_from_at_its_end_and_otherwise_from_before_it(
    models: Any, start: Any, town: Any, settled: Any
) -> None:
    model = models(**WINDOWS.model)
    talks = [town(1, seed=30).conversations[0] for _ in "two"]
    with start(model, *WINDOWS.tight, host_size="60MB") as server, start(model) as reference:
        for talk, asked in zip(talks, (server, reference), strict=False):
            talk.turn(asked, 40, 300)
        prompt = len(talks[0].tokens) - 300
        settled(server)
        # Of the middle of the answer SGLang has forgotten the windows before the answer was whole.
        parting = talks[0].tokens[: prompt + 150]
        for tokens, known in ((talks[0].tokens, prompt + 299), (parting, prompt)):
            town(4, seed=9).hold(server, 1)
            tokens = [*tokens, *town(1, seed=31).conversations[0].tokens[:30]]
            reply = server.generate(tokens, 16)
            assert reply["meta_info"]["cached_tokens_details"]["host"] == known // PAGE * PAGE
            assert reply["output_ids"] == reference.generate(tokens, 16)["output_ids"]


def test_windows_that_were_lost_and_computed_again_are_kept_once_more(
    models: Any, start: Any, town: Any, settled: Any
) -> None:
    # The device has room for the KV of all, and for few windows; host memory has 1.7 times as much.
    few = ("--max-total-tokens", "4096", "--swa-full-tokens-ratio", "0.2")
    talk = town(1, seed=40).conversations[0]
    with start(models(**WINDOWS.model), *few, host_size="8.5MB") as server:
        for others in (4, 2, 0):
            talk.turn(server, 40, 16)
            settled(server)
            town(others, seed=41 + others).hold(server, 1)
            settled(server)
    lost, found = (turn["device"] + turn["host"] for turn in talk.cached[1:])
    assert lost == 0
    assert found == 448
