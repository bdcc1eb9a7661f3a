"""A model with sliding windows that SGLang forgets: they come back with the KV, and the answers are the same."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from benchmark.server import Server

MODEL = {"architecture": "mellum"}
TIGHT = ("--max-total-tokens", "1600", "--swa-full-tokens-ratio", "0.5")
PAGE = 64


def windows_of(server: Server, store_states: Any) -> dict[str, Any]:
    return store_states(server)[0]["windows"]


def test_windows_come_back_from_host_memory_disk_and_after_a_restart(
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
    # Host memory for a third of the pages: the others come from disk.
    with start(model, *tiers, host_size="3MB") as server:
        actual.hold(server, 2, (1, 3))
        settled(server)
        before = windows_of(server, store_states)
    with start(model, *tiers, host_size="3MB") as server:
        actual.hold(server, 1, (2,))
        after = windows_of(server, store_states)
    assert matches(actual, answers(conversations=6, turns=3, **MODEL))
    assert actual.cached("storage") > 2_000
    assert actual.cached("device") + actual.cached("host") + actual.cached("storage") > 5_000
    assert before["saved"] > before["host_pages"]
    assert not before["failed"]
    # Of each conversation the last pages, not all.
    assert 12 <= before["loaded"] <= 18
    assert 12 <= after["fetched"] <= 18
    assert sorted(path.name for path in tmp_path.iterdir()) == ["dp0-pp0-tp0", "dp0-pp0-tp0-windows"]


def test_a_long_answer_is_gone_on_from_at_its_end_and_otherwise_from_before_it(
    models: Any, start: Any, town: Any, settled: Any
) -> None:
    model = models(**MODEL)
    talks = [town(1, seed=30).conversations[0] for _ in "two"]
    with start(model, *TIGHT, host_size="60MB") as server, start(model) as reference:
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


def test_ranks_agree_on_where_to_go_on_from(
    models: Any, start: Any, town: Any, answers: Any, matches: Any
) -> None:
    actual, model, two = town(6), models(**MODEL), ("--tp-size", "2")
    with start(model, *TIGHT, *two, "--chunked-prefill-size", "256", host_size="60MB") as server:
        actual.hold(server, 3, (1, 2, 3))
    assert matches(actual, answers(*two, conversations=6, turns=3, **MODEL))
    assert actual.cached("host") > 5_000


def test_windows_that_were_lost_and_computed_again_are_kept_once_more(
    models: Any, start: Any, town: Any, settled: Any
) -> None:
    # The device has room for the KV of all, and for few windows; host memory has 1.7 times as much.
    few = ("--max-total-tokens", "4096", "--swa-full-tokens-ratio", "0.2")
    talk = town(1, seed=40).conversations[0]
    with start(models(**MODEL), *few, host_size="8.5MB") as server:
        for others in (4, 2, 0):
            talk.turn(server, 40, 16)
            settled(server)
            town(others, seed=41 + others).hold(server, 1)
            settled(server)
    lost, found = (turn["device"] + turn["host"] for turn in talk.cached[1:])
    assert lost == 0
    assert found == 448
