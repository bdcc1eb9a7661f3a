"""A server that prefills for another one keeps conversations; the two answer as one server would."""

from __future__ import annotations

import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from itertools import count
from pathlib import Path
from typing import Any

import pytest

from benchmark.mooncake import Master, missing
from benchmark.server import Server, free_port

ENV = {
    # What SGLang does with an event of CUDA unless it is told otherwise.
    "SGLANG_DISAGGREGATION_ALL_CP_RANKS_TRANSFER": "1",
    "SGLANG_DISAGG_PREFILL_EARLY_SEND_CACHED_PREFIX": "0",
}
TRANSFER = ("--disaggregation-transfer-backend", "mooncake_tcp")
DECODE = ("--disaggregation-mode", "decode", *TRANSFER, "--disaggregation-decode-retraction-backup", "cpu_tensor")
KEEP = "--disaggregation-decode-enable-radix-cache"
TIGHT = ("--max-total-tokens", "1600", "--chunked-prefill-size", "256", "--enable-metrics")
TURNS, ANSWER, PAGE = 3, 100, 64


class Pair:
    """A server that prefills, and one that decodes, as a router would use them."""

    def __init__(self, prefill: Server, decode: Server, port: int) -> None:
        self._prefill = prefill
        self._decode = decode
        self._port = port
        self._rooms = count(1)
        self._requests = ThreadPoolExecutor(8)
        self.meanwhile: Callable[[], None] = lambda: None
        """Called after the one that prefills was asked, before the other is."""

    def generate(self, prompt: list[int], answer: int, **request: Any) -> Any:
        """The answer of the one that decodes, with what the other says of its prompt."""
        where = {"bootstrap_host": "127.0.0.1", "bootstrap_port": self._port, "bootstrap_room": next(self._rooms)}
        prefill = self._requests.submit(self._prefill.generate, prompt, answer, **where, **request)
        self.meanwhile()
        reply = self._decode.generate(prompt, answer, **where, **request)
        reply["meta_info"]["cached_tokens_details"] = prefill.result()["meta_info"]["cached_tokens_details"]
        return reply


def test_a_server_that_prefills_keeps_conversations(
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
    if (reason := missing()) is not None:
        pytest.skip(reason)
    model, port, actual, waited = models(), free_port(), town(6), list[int]()
    tiers = (*TIGHT, *disk_tier(tmp_path, "200MB"), "--disaggregation-bootstrap-port", str(port))
    prefill = ("--disaggregation-mode", "prefill", *TRANSFER, *tiers)
    with (
        start(model, *prefill, host_size="12MB", env=ENV) as prefiller,
        start(model, "--max-total-tokens", "20000", *DECODE, env=ENV) as decoder,
    ):

        def wait_until_it_waits() -> None:
            deadline = time.monotonic() + 60
            while not store_states(prefiller)[0]["waiting"]:
                assert time.monotonic() < deadline, "the request is not waiting"
                time.sleep(0.05)
            time.sleep(0.5)
            waited.append(store_states(prefiller)[0]["waiting"])

        pair = Pair(prefiller, decoder, port)
        actual.hold(pair, 2, (1, 3))
        # Others take the device and host memory.
        town(3, history=1_200, seed=1).hold(pair, 1)
        settled(prefiller)
        # The decode server is late: what a request waits for comes from the disk meanwhile, and stays.
        pair.meanwhile = wait_until_it_waits
        before = actual.cached("storage")
        actual.hold(pair, 1)
        rest = settled(prefiller, "waiting", "pins")
        time.sleep(1.5)  # Metrics are published about once a second.
        prompts = prefiller.metric("sglang:cached_attention_prompts_total")
    assert matches(actual, answers(conversations=30, turns=6))
    assert actual.cached("storage") - before > 2_000
    assert actual.cached("device") + actual.cached("host") + actual.cached("storage") > 5_000
    assert waited == [1] * 6
    assert rest["recomputed"] == 0
    assert prompts == 22  # With the one that SGLang warms the server up with.


def test_the_next_turn_finds_the_answer(master: Master, models: Any, start: Any, town: Any, settled: Any) -> None:
    """It was decoded on a server that saves answers only, and is longer than a page."""
    model, port, actual, expected = models(), free_port(), town(3), town(3)
    remote = ("--cached-attention-remote", master.url("256MB"), "--cached-attention-wait", "complete")
    prefill = ("--disaggregation-mode", "prefill", "--disaggregation-bootstrap-port", str(port), *TRANSFER)
    tokens = ("--max-total-tokens", "20000")

    def reused(conversation: Any) -> int:
        """Pages of its last prompt that were not computed."""
        return sum(conversation.cached[-1][tier] for tier in ("device", "host", "storage")) // PAGE

    def hold(talk: Any, server: Any) -> None:
        for conversation in talk.conversations:
            conversation.turn(server, 40, ANSWER)

    with start(model, *tokens) as reference:
        for _ in range(TURNS):
            hold(expected, reference)
    with (
        start(model, *prefill, *remote, *tokens, host_size="80MB", env=ENV) as prefiller,
        start(model, *DECODE, KEEP, *remote, *tokens, host_size="20MB", env=ENV) as decoder,
    ):
        pair, answered = Pair(prefiller, decoder, port), 0
        for turn in range(TURNS):
            # The last token of an answer is computed with the next turn.
            known = [(len(talk.tokens) - 1) // PAGE for talk in actual.conversations]
            hold(actual, pair)
            assert [reused(talk) for talk in actual.conversations] == (known if turn else [0] * 3)
            for talk in actual.conversations:
                answered += (len(talk.tokens) - 1) // PAGE - (len(talk.tokens) - ANSWER) // PAGE
            settled(prefiller, "remote_unshared")
            saved = settled(decoder, "remote_unshared")["saved"]
    assert actual.answers == expected.answers
    assert saved == answered
