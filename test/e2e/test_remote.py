"""Two servers that share a Mooncake store: a conversation moves, and what fails costs hits, not answers."""

from __future__ import annotations

import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from benchmark.mooncake import Master, missing
from benchmark.server import Server
from cached_attention.metrics import PREFIX

PATIENCE = 120.0
PAGE = 64
CONVERSATIONS = 4
TOKENS = ("--max-total-tokens", "2048")
KEY = "5a" * 32
"""What is shared is encrypted."""


def until(reached: Callable[[], bool], what: str) -> None:
    deadline = time.monotonic() + PATIENCE
    while not reached():
        assert time.monotonic() < deadline, what
        time.sleep(0.1)


def test_conversations_move_between_servers_that_fail(
    master: Master,
    models: Callable[..., Path],
    start: Any,
    town: Any,
    answers: Any,
    matches: Any,
    store_states: Any,
    disk_tier: Any,
    tmp_path: Path,
) -> None:
    remote = ("--cached-attention-remote", master.url("256MB"), "--cached-attention-wait", "complete")
    (secret := tmp_path / "key").write_text(KEY)
    secret.chmod(0o600)
    remote = (*remote, "--cached-attention-encryption-key-file", str(secret))
    expected = answers(conversations=30, turns=6)  # What other tests ask for as well.
    talk = town(CONVERSATIONS)

    def state(server: Server) -> dict[str, Any]:
        (counters,) = store_states(server)
        return counters

    def is_shared(server: Server) -> bool:
        """Also lets a scheduler that sleeps without requests take its next step."""
        return state(server)["remote_healthy"] and not state(server)["remote_unshared"]

    def hold(server: Server) -> int:
        """One turn of everybody; the tokens of it that did not have to be computed."""
        before = talk.cached("storage")
        talk.hold(server, 1, (2,))
        assert matches(talk, expected)
        return talk.cached("storage") - before

    with ExitStack() as servers:
        doomed = ExitStack()
        a = doomed.enter_context(start(models(), *TOKENS, *remote, host_size="80MB", doomed=True))
        below = (*remote, *disk_tier(tmp_path / "kv", "1GB"), "--enable-metrics")
        b = servers.enter_context(start(models(), *TOKENS, *below, host_size="80MB"))
        hold(a)
        until(lambda: is_shared(a), "A does not share")
        found = hold(b)
        assert found > CONVERSATIONS * 300, "B does not find what A computed"
        # SGLang has one number for both; our metrics tell them apart.
        until(lambda: b.metric(f"{PREFIX}hit_tokens_total", tier="remote") == found, "hits have another tier")
        assert b.metric(f"{PREFIX}hit_tokens_total", tier="disk") == 0

        # The master dies under load, and then A.
        until(lambda: is_shared(b), "B does not share")
        with ThreadPoolExecutor(1) as pool:
            load = pool.submit(hold, b)
            master.kill()
            load.result()
        a.kill()
        doomed.close()
        hold(b)
        assert matches(talk, expected)
        assert state(b)["damage"] == ""

        # Both come back, A with nothing in memory.
        master.start()
        until(lambda: bool(state(b)["remote_healthy"]), "B does not find the master again")
        again = servers.enter_context(start(models(), *TOKENS, *remote, host_size="80MB"))
        for conversation in talk.conversations:
            b.generate(conversation.tokens, 1)  # What is in use is shared again.
        until(lambda: is_shared(b), "B does not share any more")
        assert hold(again) > CONVERSATIONS * 300, "A does not find what B has"


@pytest.mark.parametrize(
    ("replicas", "args"),
    [(1, ("--tp-size", "2")), (2, ("--tp-size", "2", "--dp-size", "2", "--enable-dp-attention"))],
    ids=["latents", "DP attention"],
)
def test_ranks_share_what_they_compute_alike(
    models: Callable[..., Path],
    start: Any,
    town: Any,
    answers: Any,
    matches: Any,
    store_states: Any,
    settled: Any,
    replicas: int,
    args: tuple[str, ...],
) -> None:
    """One copy in the store; with DP attention a conversation may move to another replica."""
    model = {"architecture": "deepseek-mla", "dtype": "float32"}
    talk = town(3)

    if (reason := missing()) is not None:
        pytest.skip(reason)
    with ExitStack() as running:
        master = running.enter_context(Master())
        remote = ("--cached-attention-remote", master.url("256MB"), "--cached-attention-wait", "complete")
        server = running.enter_context(start(models(**model), *TOKENS, *args, *remote, host_size="80MB"))
        until(lambda: all(state["remote_healthy"] for state in store_states(server)), "the store is not reached")
        for turn in range(3):
            for number, conversation in enumerate(talk.conversations):
                conversation.turn(server, 40, 16, routed_dp_rank=(number + turn) % replicas)
            settled(server, "remote_unshared")
        objects = master.objects
    assert matches(talk, answers(*args, conversations=6, turns=3, **model))
    pages = sum((len(conversation.tokens) - 1) // PAGE for conversation in talk.conversations)
    assert objects == pages
    # The whole first turn of each, where the second ran on another replica.
    first = [(len(conversation.tokens) - 2 * (40 + 16) - 1) // PAGE * PAGE for conversation in talk.conversations]
    found = [conversation.cached[1]["storage"] for conversation in talk.conversations]
    assert found == (first if replicas > 1 else [0] * len(first))
