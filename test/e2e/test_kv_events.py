"""A subscriber of a real server's KV events, over ZMQ, against what the server says of itself."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from sglang.srt.disaggregation.kv_events import BlockStored, KVEventBatch

from benchmark.server import Server, free_port
from examples.kv_events import Picture, Subscriber, subscribers

EXAMPLE = Path(__file__).parents[2] / "examples" / "kv_events.py"
NAMESPACES: list[dict[str, str]] = [{}, {"extra_key": "tenant"}, {"cache_salt": "salt"}]


class History(Picture):
    """Also remembers what ever was on the device, and the tokens of each block."""

    def __init__(self) -> None:
        super().__init__()
        self.on_device: dict[int, list[int]] = {}
        self.below: dict[int, list[int]] = {}

    def apply(self, batch: KVEventBatch) -> None:
        super().apply(batch)
        for event in batch.events:
            if isinstance(event, BlockStored):
                told = self.on_device if event.medium == "GPU" else self.below
                for i, block in enumerate(event.block_hashes):
                    told[block] = event.token_ids[i * event.block_size : (i + 1) * event.block_size]

    def count(self, medium: str) -> int:
        return len(self.stored.get(medium, ()))


@pytest.fixture(scope="module")
def server(models: Any, start: Any, disk_tier: Any, tmp_path_factory: Any) -> Iterator[Server]:
    disk = disk_tier(tmp_path_factory.mktemp("kv"), "1GB")
    live, replay = free_port(), free_port()
    config = {
        "publisher": "zmq",
        "endpoint": f"tcp://127.0.0.1:{live}",
        "bind": True,
        "replay_endpoint": f"tcp://127.0.0.1:{replay}",
    }
    events = ("--kv-events-config", json.dumps(config))
    with start(models(), "--max-total-tokens", "2048", *disk, *events, host_size="12MB") as server:
        yield server


@pytest.fixture
def agree(server: Server, store_states: Any) -> Callable[[Subscriber], bool]:
    """Whether the picture becomes what the server's counters say, once nothing moves any more."""

    def agree(subscriber: Subscriber) -> bool:
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline:
            subscriber.poll(0.2)
            state = store_states(server)[0]
            subscriber.poll(0.2)
            picture = subscriber.picture
            used = [state["host_pages_used"], state["disk_pages_used"]]
            idle = not any(state[moving] for moving in ("dirty", "writing", "saving", "pins"))
            if (
                idle
                and isinstance(picture, History)
                and used == [picture.count("CPU_PINNED"), picture.count("DISK")]
            ):
                return True
        return False

    return agree


def subscribe(server: Server) -> Subscriber:
    (subscriber,) = subscribers(server.url)
    subscriber.picture = History()
    subscriber.join()
    return subscriber


def test_the_picture_is_what_the_server_says(server: Server, town: Any, agree: Any, store_states: Any) -> None:
    early = subscribe(server)
    talk = town(9)
    for turn in range(2):
        for number, conversation in enumerate(talk.conversations):
            conversation.turn(server, 40 + turn, 16, **NAMESPACES[number % len(NAMESPACES)])
    assert agree(early)
    state = store_states(server)[0]
    assert 0 < state["host_pages_used"] < state["disk_pages_used"], "host memory should have been too small"
    late = subscribe(server)
    assert agree(late)
    for subscriber in (early, late):
        history = subscriber.picture
        assert isinstance(history, History)
        assert history.whole
        assert len(history.below) == state["disk_pages_used"]
        assert history.below == {block: history.on_device[block] for block in history.below}
    server.flush_cache()
    for subscriber in (early, late):
        assert agree(subscriber)
        assert not any(subscriber.picture.stored.values())
        subscriber.close()


def test_the_example_prints_what_is_stored(server: Server, town: Any, agree: Any) -> None:
    town(1).hold(server, 1)
    subscriber = subscribe(server)
    assert agree(subscriber)
    subscriber.close()
    command = [sys.executable, str(EXAMPLE), "--base-url", server.url, "--seconds", "5"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    assert f"{subscriber.picture}\n" in done.stdout, done.stdout
