"""What a server tells of its store: /metrics, the log, /server_info, and `cached-attention top`."""

from __future__ import annotations

import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from cached_attention.metrics import METRICS, PREFIX, Kind

CONVERSATIONS, TURNS, PAGE = 8, 4, 64
DEADLINE = 60.0
"""Seconds until what has happened must have been published."""


@pytest.fixture(scope="module")
def served(
    models: Any, start: Any, town: Any, disk_tier: Any, tmp_path_factory: Any
) -> Iterator[tuple[Any, Any]]:
    """A server whose conversations fit neither the device nor host memory, and the talk held with it."""
    disk = disk_tier(tmp_path_factory.mktemp("disk"), "2GB")
    args = ("--max-total-tokens", "2048", *disk, "--enable-metrics")
    with start(models(), *args, host_size="20MB") as server:
        talk = town(CONVERSATIONS)
        talk.hold(server, TURNS, (1, 3))
        yield server, talk


def eventually(value: Callable[[], Any], expected: Any) -> None:
    """Metrics are published about once a second."""
    deadline = time.monotonic() + DEADLINE
    while (found := value()) != expected:
        assert time.monotonic() < deadline, f"{found}, not {expected}"
        time.sleep(0.2)


def top(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [str(Path(sys.executable).parent / "cached-attention"), "top", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)


def test_hits_are_those_that_the_responses_report(served: Any) -> None:
    server, talk = served
    for tier, reported in (("device", "device"), ("host", "host"), ("disk", "storage")):
        eventually(lambda tier=tier: server.metric(f"{PREFIX}hit_tokens_total", tier=tier), talk.cached(reported))
    assert talk.cached("storage") > 0
    assert talk.cached("host") > 0


def test_every_metric_is_there_and_carries_the_labels_of_the_scheduler(served: Any) -> None:
    server, _ = served
    samples = server._samples()
    suffix = {Kind.COUNTER: "", Kind.GAUGE: "", Kind.HISTOGRAM: "_count"}
    seen = {name: labels for name, labels, _ in samples if name.startswith(PREFIX)}
    assert {metric.full_name + suffix[metric.kind] for metric in METRICS} <= seen.keys()
    (scheduler,) = (labels for name, labels, _ in samples if name == "sglang:num_queue_reqs")
    assert all(scheduler.items() <= labels.items() for labels in seen.values())


def test_what_moves_is_counted_in_bytes_pages_and_seconds(served: Any, settled: Any) -> None:
    server, _ = served
    state = settled(server)
    for direction, tier, pages in (
        ("load", "host", state["loaded"]),
        ("save", "host", state["saved"]),
        ("fetch", "disk", state["fetched"]),
    ):
        labels = {"direction": direction, "tier": tier}
        assert pages > 0
        eventually(lambda at=labels: server.metric(f"{PREFIX}transfer_pages_total", **at), pages)
        moved = server.metric(f"{PREFIX}transfer_bytes_total", **labels)
        assert moved == pages * state["page_bytes"]
        assert server.metric(f"{PREFIX}transfer_seconds_count", **labels) > 0
        assert server.metric(f"{PREFIX}transfer_seconds_sum", **labels) > 0
    assert server.metric(f"{PREFIX}load_wait_seconds_count") > 0


def test_fill_and_evictions_are_the_stores(served: Any, settled: Any) -> None:
    server, _ = served
    state = settled(server)
    for tier in ("host", "disk"):
        used, capacity = state[f"{tier}_pages_used"], state[f"{tier}_pages"]
        eventually(lambda tier=tier: server.metric(f"{PREFIX}resident_pages", tier=tier), used)
        assert server.metric(f"{PREFIX}resident_bytes", tier=tier) == used * state["page_bytes"]
        assert server.metric(f"{PREFIX}capacity_pages", tier=tier) == capacity
    assert server.metric(f"{PREFIX}tier_healthy", tier="disk") == 1
    assert state["evicted"] > 0
    evicted = {"tier": "host", "reason": "room"}
    assert server.metric(f"{PREFIX}evicted_pages_total", **evicted) == state["evicted"]


def test_the_hottest_conversations_are_named_by_nothing_of_theirs(served: Any, store_states: Any) -> None:
    server, talk = served
    hottest = store_states(server)[0]["hottest"]
    assert len(hottest) == CONVERSATIONS
    assert [known["turns"] for known in hottest] == [TURNS] * CONVERSATIONS
    assert {known["tokens"] for known in hottest} == {
        (len(conversation.tokens) - 1) // PAGE * PAGE for conversation in talk.conversations
    }
    assert all(re.fullmatch("[0-9a-f]{16}", known["conversation"]) for known in hottest)
    assert all("disk" in known["tiers"] or "host" in known["tiers"] for known in hottest)


def test_top_prints_one_frame(served: Any, store_states: Any) -> None:
    server, talk = served
    shown = top(server.url, "--once")
    assert shown.returncode == 0, shown.stderr
    rows = {line.split()[0]: line.split() for line in shown.stdout.splitlines() if line.split()}
    computed = server.metric(f"{PREFIX}prompt_tokens_total") - sum(
        talk.cached(tier) for tier in ("device", "host", "storage")
    )
    assert rows["computed"][-1] == f"{computed:,.0f}"
    assert f"{talk.cached('storage'):,}" in shown.stdout
    assert rows["disk"]
    assert "fetch disk" in shown.stdout
    assert store_states(server)[0]["hottest"][0]["conversation"] in shown.stdout
