"""`POST /cached_attention/hint`: what a client says of a conversation before its next turn arrives."""

from __future__ import annotations

import json
import random
import re
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import closing
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from benchmark.server import DIRECT, Server
from cached_attention.encryption import KEY_VARIABLE, EncryptionKey
from cached_attention.tiers.disk_reader import StoreReader

PAGE = 64
KEY = "the-admin-key"
DISK_KEY = "d15c" * 16
EXAMPLE = Path(__file__).parents[2] / "examples" / "hint.py"


@pytest.fixture(scope="module")
def directory(tmp_path_factory: Any) -> Path:
    directory: Path = tmp_path_factory.mktemp("kv")
    return directory


@pytest.fixture(scope="module")
def server(models: Any, start: Any, disk_tier: Any, directory: Path) -> Iterator[Server]:
    """Its disk is encrypted, and its log says all that it can say."""
    disk = (*disk_tier(directory, "1GB"), "--log-level", "debug")
    # What is pushed out is what was used longest ago.
    tight = ("--max-total-tokens", "2048", "--admin-api-key", KEY, "--cached-attention-eviction", "lru")
    with start(models(), *tight, *disk, host_size="12MB", env={KEY_VARIABLE: DISK_KEY}) as server:
        yield server


@pytest.fixture
def prompt(request: pytest.FixtureRequest) -> Callable[[int], list[int]]:
    words = random.Random(request.node.nodeid)
    return lambda count: words.choices(range(5, 1000), k=count)


def hint(server: Server, **body: Any) -> dict[str, Any]:
    answer: dict[str, Any] = json.loads(post(server, body, KEY))
    return answer


def post(server: Server, body: dict[str, Any], key: str) -> bytes:
    headers = {"Content-Type": "application/json", "Authorization": f"Bearer {key}"}
    request = urllib.request.Request(f"{server.url}/cached_attention/hint", json.dumps(body).encode(), headers)
    with DIRECT.open(request, timeout=60) as response:
        data: bytes = response.read()
    return data


def cached(reply: dict[str, Any]) -> dict[str, int]:
    details = reply["meta_info"]["cached_tokens_details"] or {}
    return {tier: details.get(tier, 0) for tier in ("device", "host", "storage")}


def leave_only_the_disk(server: Server, prompt: Any, settled: Any) -> None:
    """Push everything else out of the device and of host memory, once all of it is on disk."""
    for _ in range(4):
        settled(server)
        server.generate(prompt(1500), 1)
    settled(server)


def wait_for(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.1)


@pytest.mark.parametrize("named_by", ["prompt", "conversation"])
def test_an_expected_turn_finds_its_pages_in_host_memory(
    server: Server, prompt: Any, store_states: Any, settled: Any, named_by: str
) -> None:
    tokens = prompt(10 * PAGE)
    rid = f"turn-{named_by}"
    server.generate(tokens, 4, rid=rid)
    leave_only_the_disk(server, prompt, settled)
    fetched = store_states(server)[0]["fetched"]
    hint(server, **{named_by: tokens if named_by == "prompt" else rid}, expect_in_s=5)
    wait_for(lambda: store_states(server)[0]["fetched"] >= fetched + 10)
    reply = server.generate(tokens + prompt(30), 4)
    assert cached(reply) == {"device": 0, "host": 10 * PAGE, "storage": 0}
    assert store_states(server)[0]["pins"] == 0


def test_without_a_hint_they_come_from_disk(server: Server, prompt: Any, settled: Any) -> None:
    tokens = prompt(10 * PAGE)
    server.generate(tokens, 4)
    leave_only_the_disk(server, prompt, settled)
    assert cached(server.generate(tokens + prompt(30), 4))["storage"] == 10 * PAGE


def test_a_kept_conversation_stays_in_host_memory(server: Server, prompt: Any, settled: Any) -> None:
    tokens = prompt(10 * PAGE)
    server.generate(tokens, 4)
    hint(server, prompt=tokens, keep=True)
    leave_only_the_disk(server, prompt, settled)
    assert cached(server.generate(tokens + prompt(30), 4))["host"] == 10 * PAGE
    hint(server, prompt=tokens, drop=True)


def test_a_dropped_conversation_is_gone_from_every_tier(
    server: Server, prompt: Any, store_states: Any, settled: Any
) -> None:
    tokens = prompt(10 * PAGE)
    server.generate(tokens, 4, cache_salt="tenant")
    leave_only_the_disk(server, prompt, settled)
    hint(server, prompt=tokens, drop=True)
    assert cached(server.generate(tokens, 4, cache_salt="tenant"))["storage"] == 9 * PAGE, "another tenant's"
    leave_only_the_disk(server, prompt, settled)
    on_disk = settled(server)["disk_pages_used"]
    hint(server, prompt=tokens, drop=True, cache_salt="tenant")
    wait_for(lambda: store_states(server)[0]["disk_pages_used"] <= on_disk - 10)
    assert sum(cached(server.generate(tokens, 4, cache_salt="tenant")).values()) == 0


def test_messages_are_rendered_as_in_a_chat(server: Server, store_states: Any) -> None:
    run = subprocess.run(
        [sys.executable, str(EXAMPLE), "--base-url", server.url, "--api-key", KEY],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert run.returncode == 0, run.stdout + run.stderr
    assert "turn 2: " in run.stdout
    assert run.stdout.endswith("dropped\n")


@pytest.mark.parametrize(
    ("body", "sentence"),
    [
        ({}, "give one of 'prompt', 'messages' and 'conversation'"),
        ({"prompt": [5], "conversation": "x", "keep": True}, "give one of 'prompt', 'messages' and 'conv"),
        ({"prompt": [5]}, "give one of 'expect_in_s' (seconds), 'keep' (true) and 'drop' (true)"),
        ({"prompt": [5], "expect_in_s": -1}, "greater than or equal to 0"),
        ({"prompt": [5], "expect_in_s": 1e9}, "less than or equal to 86400"),
        ({"prompt": [10**10], "keep": True}, "less than 2147483648"),
        ({"prompt": [5] * 5000, "keep": True}, "longer than the model's context length"),
        ({"prompt": "", "keep": True}, "at least 1 "),
        ({"messages": [{"role": "nobody"}], "keep": True}, "role"),
        ({"conversation": "", "keep": True}, "at least 1 character"),
    ],
)
def test_a_wrong_hint_gets_one_sentence(server: Server, body: dict[str, Any], sentence: str) -> None:
    with pytest.raises(urllib.error.HTTPError) as refusal:
        hint(server, **body)
    assert refusal.value.code == 400
    message = json.loads(refusal.value.read())["error"]["message"]
    assert sentence in message
    assert "\n" not in message
    assert "http" not in message
    assert server.ready


def test_an_unknown_conversation_is_taken_and_does_nothing(server: Server, store_states: Any) -> None:
    assert hint(server, conversation="nobody", expect_in_s=1)["outlook"] == "expected"
    assert server.generate([5, 6, 7], 1)["output_ids"]


def keys_on_disk(directory: Path) -> set[bytes]:
    (store,) = (path for path in directory.iterdir() if path.is_dir())
    with closing(StoreReader(store, EncryptionKey(bytes.fromhex(DISK_KEY)))) as reader:
        keys = {record.key for record in reader.records()}
        assert not reader.damaged_rows
    return keys


def test_tenants_share_no_page_on_disk(server: Server, prompt: Any, settled: Any, directory: Path) -> None:
    tokens = prompt(10 * PAGE)
    known = [keys_on_disk(directory)]
    for tenant in ("alice", "bob"):
        assert sum(cached(server.generate(tokens, 4, cache_salt=tenant)).values()) == 0
        settled(server)
        known.append(keys_on_disk(directory))
    assert [len(later - earlier) for earlier, later in pairwise(known)] == [10, 10]
    leave_only_the_disk(server, prompt, settled)
    assert cached(server.generate(tokens, 4, cache_salt="alice"))["storage"] == 9 * PAGE


def test_nothing_of_a_prompt_is_in_the_log(server: Server, prompt: Any, settled: Any) -> None:
    word, pattern = "zyzzyva", [917, 333, 918, 334]
    tokens = pattern * 80
    server.generate(tokens, 4, cache_salt=f"{word}-salt")
    server.generate(f" {word}" * 200, 4)
    leave_only_the_disk(server, prompt, settled)
    server.generate(tokens + prompt(30), 4, cache_salt=f"{word}-salt")
    hint(server, prompt=f" {word}" * 200, drop=True)
    with pytest.raises(urllib.error.HTTPError):
        hint(server, prompt=f" {word}" * 200, keep=True, drop=True)
    log = server.log.read_text(errors="replace")
    assert "DEBUG" in log or "debug" in log
    assert word not in log
    assert DISK_KEY not in log
    assert f"is encrypted, key {EncryptionKey(bytes.fromhex(DISK_KEY)).id}." in log
    assert not re.search(r"917\D{1,3}333\D{1,3}918", log)


def test_hints_need_the_admin_key_where_there_is_one(server: Server) -> None:
    with pytest.raises(urllib.error.HTTPError) as refusal:
        post(server, {"prompt": [5], "keep": True}, "another key")
    assert refusal.value.code == 401
