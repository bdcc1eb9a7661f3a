"""With a draft model, whose KV comes back as well: the same answers, and as many drafts that were right."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from benchmark.server import Server

STEPS = 3
PLENTY = ("--max-total-tokens", "40000")
TIGHT = ("--max-total-tokens", "1600")
PAGE = 64
PLAIN_PAGE = 4 * 2 * 2 * 64 * PAGE * 4
"""Bytes of a page of the tiny model: layers, K and V, heads, width, tokens, float32."""


class Drafts:
    """A server that counts the drafts of each answer."""

    def __init__(self, server: Server) -> None:
        self._server = server
        self.right: list[int] = []

    def generate(self, *request: Any, **options: Any) -> Any:
        reply = self._server.generate(*request, **options)
        self.right.append(reply["meta_info"]["spec_num_correct_drafts"])
        return reply


def speculative(algorithm: str, draft: Path) -> tuple[str, ...]:
    chain = ("--speculative-num-steps", str(STEPS), "--speculative-eagle-topk", "1")
    drafts = ("--speculative-num-draft-tokens", str(STEPS + 1))
    model = ("--speculative-draft-model-path", str(draft))
    return ("--speculative-algorithm", algorithm, *model, *chain, *drafts)


def hint(server: Server, **body: Any) -> None:
    server.post("/cached_attention/hint", body)


def test_a_draft_model_finds_its_own_keys_and_values_again(
    models: Any, start: Any, town: Any, disk_tier: Any, store_states: Any, settled: Any, tmp_path: Path
) -> None:
    model = models()
    # Its own draft model: how many drafts are right depends on all of the draft's KV.
    draft = speculative("STANDALONE", model)
    expected, actual = town(6), town(6)
    with start(model, *PLENTY, *draft) as server:
        counted = Drafts(server)
        expected.hold(counted, 3)
    # Host memory for a third of the pages: the others come from disk.
    tiers = (*TIGHT, *draft, *disk_tier(tmp_path, "200MB"))
    with start(model, *tiers, host_size="12MB") as server:
        again = Drafts(server)
        actual.hold(again, 2)
        settled(server)
    with start(model, *tiers, host_size="12MB") as server:
        after = Drafts(server)
        actual.hold(after, 1)
        (state,) = store_states(server)
    assert actual.answers == expected.answers
    assert again.right + after.right == counted.right
    assert sum(counted.right) > 100
    assert actual.cached("storage") > 3_000
    assert state["page_bytes"] == 2 * PLAIN_PAGE


def test_pages_that_are_named_by_pairs_of_tokens(
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
    model, draft = models(), speculative("EAGLE", models("llama-eagle"))
    actual = town(4)
    tiers = (*TIGHT, *draft, *disk_tier(tmp_path, "200MB"))
    with start(model, *tiers, host_size="20MB") as server:
        actual.hold(server, 2)
        state = settled(server)
        ended, kept = town(1, seed=1), state["disk_pages_used"]
        ended.conversations[0].turn(server, 40, 16, rid="ended")
        assert settled(server)["disk_pages_used"] > kept
        hint(server, conversation="ended", drop=True)
        assert settled(server)["disk_pages_used"] == kept
    assert state["page_bytes"] == PLAIN_PAGE * 5 // 4
    with start(model, *tiers, host_size="40MB") as server:
        for conversation in actual.conversations:
            hint(server, prompt=conversation.tokens, expect_in_s=5)
        pages = sum((len(conversation.tokens) - 2) // PAGE for conversation in actual.conversations)
        deadline = time.monotonic() + 60
        while (fetched := store_states(server)[0]["fetched"]) < pages:
            assert time.monotonic() < deadline, f"{fetched} of {pages} pages were fetched"
            time.sleep(0.1)
        actual.hold(server, 1)
    assert matches(actual, answers(conversations=30, turns=6))
    assert actual.cached("host") > 3_000


def test_a_draft_model_of_a_model_with_sliding_windows(models: Any, start: Any, town: Any) -> None:
    model, draft = models("mellum"), speculative("STANDALONE", models())
    expected, actual = town(4), town(4)
    with start(model, *PLENTY, *draft) as server:
        counted = Drafts(server)
        expected.hold(counted, 2)
    with start(model, *TIGHT, *draft, host_size="30MB") as server:
        again = Drafts(server)
        actual.hold(again, 2)
    assert actual.answers == expected.answers
    assert again.right == counted.right
    assert actual.cached("host") > 1_500
