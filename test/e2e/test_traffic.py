"""Conversations, aborts, priorities and hints at random, under each way to schedule: always the right answer.

SOAK_SECONDS=600 makes the last test a soak of ten minutes.
"""

from __future__ import annotations

import os
import random
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from benchmark.server import Server, ServerError

CONVERSATIONS, TURNS, CLIENTS = 12, 6, 6
NEW, ANSWER = 40, 16
TIGHT = ("--max-total-tokens", "2560")
"""Two or three of the conversations."""
HOST = "12MB"
"""Of which the longest conversation takes a third."""
DRAFTED_HOST = "24MB"
SOAK_SECONDS = float(os.environ.get("SOAK_SECONDS", "15"))


@pytest.fixture(scope="module")
def expected(answers: Any) -> dict[str, Any]:
    """Per tensor parallelism: answers of a server that keeps everything on the device."""
    two = answers("--tp-size", "2", conversations=CONVERSATIONS, turns=TURNS)
    return {"1": answers(conversations=30, turns=TURNS), "2": two}


class Traffic:
    """Clients that hold the town's conversations at once, each with interruptions of its own.

    Args:
        expected: per conversation, per turn: the answer.
    """

    def __init__(self, server: Server, town: Any, expected: list[list[list[int]]], hints: bool = False) -> None:
        self._server = server
        self._town = town
        self._expected = expected
        self._hints = hints
        self._until = 0.0
        self._hinted: list[list[int]] = []
        self.turns = self.aborted = 0
        self.storage = self.host = 0
        self._lock = threading.Lock()

    def run(self, rounds: int, seconds: float = 0.0) -> None:
        """Hold every conversation `rounds` times from its start, and on until `seconds` have passed."""
        self._until = time.monotonic() + seconds
        with ThreadPoolExecutor(CLIENTS) as clients:
            list(clients.map(lambda client: self._client(client, rounds), range(CLIENTS)))
        for tokens in self._hinted:  # It would be waited for another minute.
            self._server.post("/cached_attention/hint", {"prompt": tokens, "drop": True})

    def _client(self, client: int, rounds: int) -> None:
        dice = random.Random(client)
        held = 0
        while held < rounds or time.monotonic() < self._until:
            for number in range(client, CONVERSATIONS, CLIENTS):
                conversation = self._town(CONVERSATIONS).conversations[number]
                for _ in range(TURNS):
                    self._turn(conversation, number, dice)
            held += 1

    def _turn(self, conversation: Any, number: int, dice: random.Random) -> None:
        if dice.random() < 0.3:
            self._abort(conversation.tokens, dice)
        if self._hints and dice.random() < 0.2:
            self._hint(conversation.tokens, dice)
        turn = len(conversation.answers)
        conversation.turn(self._server, NEW, ANSWER, priority=dice.randint(0, 3))
        assert conversation.answers[-1] == self._expected[number][turn], f"conversation {number}, turn {turn}"
        with self._lock:
            self.turns += 1
            self.storage += conversation.cached[-1]["storage"]
            self.host += conversation.cached[-1]["host"]

    def _abort(self, tokens: list[int], dice: random.Random) -> None:
        rid = f"aborted-{dice.random()}"
        request = {"rid": rid}
        abort = threading.Timer(dice.uniform(0, 0.3), lambda: self._server.post("/abort_request", request))
        abort.start()
        try:
            self._server.generate([*tokens, *dice.choices(range(5, 1000), k=30)], 100, rid=rid)
        except ServerError as refusal:
            if "abort" not in str(refusal).lower():
                raise
        finally:
            abort.join()
        with self._lock:
            self.aborted += 1

    def _hint(self, tokens: list[int], dice: random.Random) -> None:
        outlook = dice.choice([{"expect_in_s": dice.random()}, {"drop": True}])
        self._server.post("/cached_attention/hint", {"prompt": tokens, **outlook})
        with self._lock:
            self._hinted.append(list(tokens))


@pytest.fixture
def disk(tmp_path: Path, disk_tier: Any) -> Any:
    return disk_tier(tmp_path, "200MB")


@pytest.fixture
def at_rest(store_states: Any, settled: Any) -> Any:
    """Waits until nothing is held for anybody, and checks that the store is whole."""

    def check(server: Server) -> None:
        settled(server, "pins", "waiting")
        assert [state["damage"] for state in store_states(server)] == [""]

    return check


@pytest.mark.parametrize(
    ("architecture", "plenty", "few"),
    [
        ("qwen3.5", ("--max-mamba-cache-size", "400"), ("--max-mamba-cache-size", "18")),
        ("mellum", (), ("--swa-full-tokens-ratio", "0.5")),
    ],
    ids=["states", "windows"],
)
def test_a_hybrid_model_answers_as_without_tiers(
    models: Any,
    start: Any,
    town: Any,
    answers: Any,
    architecture: str,
    plenty: tuple[str, ...],
    few: tuple[str, ...],
    disk: tuple[str, ...],
    at_rest: Any,
) -> None:
    expected = answers(*plenty, conversations=CONVERSATIONS, turns=TURNS, architecture=architecture)
    busy = ("--max-running-requests", "3", *few, "--chunked-prefill-size", "256")
    with start(models(architecture), *TIGHT, *busy, *disk, host_size="6MB") as server:
        traffic = Traffic(server, town, expected, hints=True)
        traffic.run(rounds=1)
        at_rest(server)
    assert traffic.turns == CONVERSATIONS * TURNS
    assert traffic.host + traffic.storage > 4_000


@pytest.mark.parametrize(
    "args",
    [
        ("--schedule-policy", "lpm", "--chunked-prefill-size", "256"),
        ("--enable-priority-scheduling", "--priority-scheduling-preemption-threshold", "0"),
        ("--schedule-policy", "fcfs", "--tp-size", "2"),
        (
            *("--speculative-algorithm", "STANDALONE", "--speculative-draft-model-path", "{model}"),
            *("--speculative-num-steps", "2", "--speculative-num-draft-tokens", "3"),
            *("--speculative-eagle-topk", "1"),
        ),
    ],
    ids=["lpm-chunked", "priority-preemption", "fcfs-tp2", "drafts"],
)
def test_any_schedule_answers_as_without_tiers(
    models: Any, start: Any, town: Any, expected: Any, disk: tuple[str, ...], at_rest: Any, args: tuple[str, ...]
) -> None:
    ranks = args[-1] if "--tp-size" in args else "1"
    busy = ("--max-running-requests", "3", *(arg.format(model=models()) for arg in args))
    # A page of the model and its draft, the same one here, is twice as large.
    host = DRAFTED_HOST if "{model}" in args else HOST
    with start(models(), *TIGHT, *busy, *disk, host_size=host) as server:
        traffic = Traffic(server, town, expected[ranks])
        traffic.run(rounds=1)
        at_rest(server)
    assert traffic.turns == CONVERSATIONS * TURNS
    assert traffic.host > 2_000
    assert traffic.storage > 2_000
    assert traffic.aborted > 10


def test_soak(
    models: Any, start: Any, town: Any, expected: Any, disk: tuple[str, ...], at_rest: Any, store_states: Any
) -> None:
    args = ("--schedule-policy", "lpm", "--enable-mixed-chunk", "--chunked-prefill-size", "512")
    with start(models(), *TIGHT, *disk, *args, host_size=HOST) as server:
        traffic = Traffic(server, town, expected["1"], hints=True)
        traffic.run(rounds=1, seconds=SOAK_SECONDS)
        at_rest(server)
        (state,) = store_states(server)
    assert state["disk_errors"] == state["lost"] == state["failed"] == 0
    assert traffic.storage > 5_000
