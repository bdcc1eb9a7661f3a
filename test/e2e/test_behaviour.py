"""What users do to a server besides chatting: share prompts, isolate tenants, abort, flush."""

from __future__ import annotations

import json
import random
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from benchmark.server import Server, ServerError

PAGE = 64
POOL = 2048


@pytest.fixture(scope="module", params=["overlap", "no-overlap-chunked"])
def server(request: pytest.FixtureRequest, models: Any, start: Any) -> Iterator[Server]:
    args = [] if request.param == "overlap" else ["--disable-overlap-schedule", "--chunked-prefill-size", "256"]
    with start(models(), "--max-total-tokens", str(POOL), *args, host_size="300MB") as server:
        yield server


@pytest.fixture(autouse=True)
def _intact(server: Server, settled: Any) -> Iterator[None]:
    """After each test the server is idle, its store is whole and nothing holds a page."""
    yield
    assert settled(server, "pins")["damage"] == ""


@pytest.fixture
def prompt(request: pytest.FixtureRequest) -> Any:
    words = random.Random(request.node.nodeid)
    return lambda count: words.choices(range(5, 1000), k=count)


def crowd_out(server: Server, prompt: Any) -> None:
    """Push everything else out of the device pool."""
    for _ in range(3):
        server.generate(prompt(POOL - 200), 1)


def cached(server: Server, tokens: list[int], **request: Any) -> dict[str, int]:
    reply = server.generate(tokens, 4, **request)
    details = reply["meta_info"]["cached_tokens_details"] or {}
    return {tier: details.get(tier, 0) for tier in ("device", "host", "storage")}


def test_a_prefix_is_shared_between_conversations(server: Server, prompt: Any) -> None:
    system, ours, theirs = prompt(6 * PAGE), prompt(100), prompt(100)
    cached(server, system + ours)
    crowd_out(server, prompt)
    assert cached(server, system + theirs) == {"device": 0, "host": 6 * PAGE, "storage": 0}
    assert cached(server, system + ours)["device"] == 6 * PAGE


@pytest.mark.parametrize("field", ["extra_key", "cache_salt"])
def test_tenants_do_not_see_each_other(server: Server, prompt: Any, field: str) -> None:
    secret = prompt(10 * PAGE)
    cached(server, secret, **{field: "alice"})
    crowd_out(server, prompt)
    assert cached(server, secret, **{field: "bob"})["host"] == 0
    assert cached(server, secret)["host"] == 0
    crowd_out(server, prompt)
    assert cached(server, secret, **{field: "alice"})["host"] >= 9 * PAGE


def test_flush_forgets_every_tier(server: Server, prompt: Any, store_states: Any) -> None:
    tokens = prompt(10 * PAGE)
    expected = server.generate(tokens, 8)["output_ids"]
    crowd_out(server, prompt)
    server.flush_cache()
    assert store_states(server)[0]["host_pages_used"] == 0
    reply = server.generate(tokens, 8)
    assert reply["meta_info"]["cached_tokens"] == 0
    assert reply["output_ids"] == expected
    crowd_out(server, prompt)
    assert cached(server, tokens)["host"] >= 9 * PAGE


def test_a_batch_loads_for_all_of_its_requests(server: Server, prompt: Any) -> None:
    prompts = [prompt(5 * PAGE + 10 * i) for i in range(4)]
    expected = [server.generate(tokens, 8)["output_ids"] for tokens in prompts]
    crowd_out(server, prompt)
    replies = server.generate(prompts, 8)
    assert [reply["output_ids"] for reply in replies] == expected
    assert all(reply["meta_info"]["cached_tokens_details"]["host"] >= 4 * PAGE for reply in replies)


def test_aborted_requests_hold_nothing(server: Server, prompt: Any, store_states: Any) -> None:
    """Requests whose history is in the host are aborted at every stage from the queue to decoding."""
    conversations = [prompt(8 * PAGE) for _ in range(6)]
    expected = [server.generate(tokens, 8)["output_ids"] for tokens in conversations]
    crowd_out(server, prompt)
    delays = random.Random(1)

    def ask(i: int) -> None:
        rid, tokens = f"aborted-{i}", conversations[i % 6] + prompt(30)
        waited = threading.Timer(delays.uniform(0, 0.4), lambda: server.post("/abort_request", {"rid": rid}))
        waited.start()
        try:
            server.generate(tokens, 200, rid=rid)
        except ServerError as refusal:
            refusals.append(str(refusal).lower())
        finally:
            waited.join()

    refusals: list[str] = []
    loaded = store_states(server)[0]["loaded"]
    with ThreadPoolExecutor(8) as clients:
        list(clients.map(ask, range(40)))
    assert store_states(server)[0]["loaded"] > loaded
    assert all("abort" in refusal for refusal in refusals)
    crowd_out(server, prompt)
    assert [server.generate(tokens, 8)["output_ids"] for tokens in conversations] == expected


def test_a_client_that_hangs_up_holds_nothing(server: Server, prompt: Any) -> None:
    import urllib.request

    tokens = prompt(8 * PAGE)
    cached(server, tokens)
    crowd_out(server, prompt)
    body = {"input_ids": tokens, "stream": True, "sampling_params": {"max_new_tokens": 500, "ignore_eos": True}}
    request = urllib.request.Request(
        server.url + "/generate", json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=60) as stream:
        assert stream.readline().startswith(b"data:")


def test_a_prompt_longer_than_the_window_is_sglangs_error(server: Server, prompt: Any) -> None:
    with pytest.raises(
        ServerError, match=r"answered 400: .*longer than the model's context length \(4096 tokens\)"
    ):
        server.generate(prompt(5_000), 4)
