"""Small models, real servers and conversations for the end-to-end tests."""

from __future__ import annotations

import json
import os
import random
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from fcntl import LOCK_EX, flock
from hashlib import sha256
from pathlib import Path
from typing import Any

import pytest

from benchmark.model import make_model
from benchmark.preloaded import PreloadedServer
from benchmark.server import Server

WORDS = range(5, 1000)
KEPT = {"--cached-attention-disk-path", "--cached-attention-remote"}
"""A server with one of these ends in order."""
HISTORY = 400
"""Tokens of the shortest conversation of a town."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if "e2e" in item.path.parts:
            item.add_marker(pytest.mark.e2e)


class Conversation:
    """A seeded user who sends its whole history each turn."""

    def __init__(self, seed: int, history: int) -> None:
        self._words = random.Random(seed)
        self.tokens = self.words(history)
        self.answers: list[list[int]] = []
        self.cached: list[dict[str, int]] = []

    def words(self, count: int) -> list[int]:
        return self._words.choices(WORDS, k=count)

    def turn(self, server: Server, new_tokens: int, answer: int, **request: Any) -> None:
        """Sends `new_tokens` more and takes the answer of `answer` tokens into the history."""
        self.tokens += self.words(new_tokens)
        reply = server.generate(self.tokens, answer, **request)
        self.answers.append(reply["output_ids"])
        nothing = {"device": 0, "host": 0, "storage": 0}
        self.cached.append(nothing | (reply["meta_info"]["cached_tokens_details"] or {}))
        self.tokens += reply["output_ids"]


class Town:
    """Conversations that are held with one server, some of them at once."""

    def __init__(self, conversations: int, history: int = HISTORY, seed: int = 0) -> None:
        self.conversations = [Conversation(seed * 10_000 + i, history + 37 * i) for i in range(conversations)]

    def hold(
        self, server: Server, turns: int, concurrency: tuple[int, ...] = (1,), replicas: int | None = None
    ) -> None:
        """Round robin over the conversations; turn t runs with `concurrency[t % len]` at once.

        replicas: number of replicas of the server, to which conversations are routed; None: the server chooses.
        """

        def turn_of(number: int) -> None:
            route = {} if replicas is None else {"routed_dp_rank": number % replicas}
            self.conversations[number].turn(server, 40, 16, **route)

        for turn in range(turns):
            with ThreadPoolExecutor(concurrency[turn % len(concurrency)]) as pool:
                list(pool.map(turn_of, range(len(self.conversations))))

    @property
    def answers(self) -> list[list[list[int]]]:
        return [conversation.answers for conversation in self.conversations]

    def cached(self, tier: str) -> int:
        """Tokens that came from `tier`, over all turns."""
        return sum(turn[tier] for conversation in self.conversations for turn in conversation.cached)


@pytest.fixture(scope="session")
def town() -> type[Town]:
    return Town


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Makes a tiny model of the given kind, once per session."""
    root = tmp_path_factory.mktemp("models")

    def model(architecture: Any = "llama", dtype: Any = "float32", seed: int = 0, context: int = 4_096) -> Path:
        path = root / f"{architecture}-{dtype}-{seed}-{context}"
        return make_model(path, architecture=architecture, dtype=dtype, seed=seed, context=context)

    return model


@pytest.fixture(scope="session")
def store_states() -> Callable[[Server], list[dict[str, Any]]]:
    """Per rank that answers: the counters of its store, and `damage`, empty when the invariants hold."""

    def states(server: Server) -> list[dict[str, Any]]:
        info = json.loads(server.get("/server_info"))
        return [state["cached_attention"] for state in info["internal_states"]]

    return states


@pytest.fixture(scope="session")
def settled(store_states: Any) -> Callable[..., dict[str, Any]]:
    """Waits until no page is on its way to host memory or to disk; the state of the first rank then.

    `also`: more counters that shall be zero, such as "pins".
    """

    def settled(server: Server, *also: str) -> dict[str, Any]:
        deadline = time.monotonic() + 120
        moving = ("saving", "dirty", "writing", *also)
        states = store_states(server)
        while any(state.get(name) for state in states for name in moving):
            assert time.monotonic() < deadline, f"never at rest: {states}"
            time.sleep(0.1)
            states = store_states(server)
        return states[0]

    return settled


@pytest.fixture(scope="session")
def start(tmp_path_factory: pytest.TempPathFactory, store_states: Any) -> Callable[..., Any]:
    """Starts a server, with CachedAttention where `host_size` is given; checks its store at the end.

    `doomed`: the server will not live until then. `command`: by the command that users type, not by a fork.
    """
    logs = tmp_path_factory.mktemp("logs")

    @contextmanager
    def start(
        model: Path,
        *args: str,
        host_size: str | None = None,
        doomed: bool = False,
        command: bool = False,
        env: Mapping[str, str] | None = None,
        **server: Any,
    ) -> Iterator[Server]:
        ours = ["--enable-cached-attention", "--cached-attention-host-size", host_size] if host_size else []
        flags = [*ours, "--page-size", "64", "--enable-cache-report", *args]
        kind = Server if command else PreloadedServer
        if not command:
            flags.append("--sleep-on-idle")  # Else each server that waits for a test would spin on a core.
        log = logs / f"{len(list(logs.iterdir()))}.log"
        checked = {"CACHED_ATTENTION_CHECK_INVARIANTS": "1", **(env or {})}
        with kind(model, flags, env=checked, log=log, **server) as running:
            yield running
            if host_size and not doomed:
                assert {state["damage"] for state in store_states(running)} == {""}
            if not KEPT.intersection(args):
                running.kill()  # It has nothing to write: SGLang takes seconds to end by itself.

    return start


@pytest.fixture(scope="session")
def disk_tier() -> Callable[..., tuple[str, ...]]:
    """Flags of a disk tier. Its pages are waited for, however quick the tiny model is on this machine."""

    def disk_tier(directory: Path, size: str) -> tuple[str, ...]:
        place = ("--cached-attention-disk-path", str(directory), "--cached-attention-disk-size", size)
        return (*place, "--cached-attention-wait", "complete")

    return disk_tier


Answers = list[list[list[int]]]


@pytest.fixture(scope="session")
def answers(models: Any, start: Any, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Answers]:
    """Per conversation of a town and per turn: what a server says that keeps everything on the device.

    Each kind of server is asked once, by the first of the processes that run the tests.
    """
    own = tmp_path_factory.getbasetemp()
    root = own.parent if "PYTEST_XDIST_WORKER" in os.environ else own

    def answers(*args: str, conversations: int, turns: int, **model: Any) -> Answers:
        kind = json.dumps([args, conversations, turns, model], sort_keys=True)
        known = root / f"answers-{sha256(kind.encode()).hexdigest()[:16]}.json"
        with known.with_suffix(".lock").open("w") as lock:
            flock(lock, LOCK_EX)
            if not known.exists():
                talk = Town(conversations, HISTORY)
                with start(models(**model), "--max-total-tokens", "60000", *args) as reference:
                    talk.hold(reference, turns, (1, 4, 2, 3))
                known.write_text(json.dumps(talk.answers))
        return json.loads(known.read_text())

    return answers


@pytest.fixture(scope="session")
def matches() -> Callable[[Town, Answers], bool]:
    """Whether every turn held so far was answered as expected."""

    def matches(talk: Town, expected: Answers) -> bool:
        held = zip(talk.answers, expected[: len(talk.answers)], strict=True)
        return all(said == wanted[: len(said)] and len(said) <= len(wanted) for said, wanted in held)

    return matches
