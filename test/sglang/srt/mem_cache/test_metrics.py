"""The store's metrics, from a store to the text that Prometheus reads."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import Future
from functools import partial
from hashlib import sha256
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.parser import text_string_to_metric_families
from sglang.srt.mem_cache.cached_attention import metrics
from sglang.srt.mem_cache.cached_attention.metrics import StoreMetrics

from cached_attention.chain import PageRun
from cached_attention.fingerprint import Fingerprint
from cached_attention.layout import DevicePool
from cached_attention.metrics import METRICS, PREFIX
from cached_attention.stats import Direction, Reason
from cached_attention.store import CachedAttentionStore
from cached_attention.tiers.disk import DiskTier

LABELS = {"model_name": "m", "tp_rank": 0}


class Published:
    """A store with both tiers, and what is published of it."""

    def __init__(self, directory: Path) -> None:
        self.pool = DevicePool([[torch.zeros(8, 1, 4) for _ in "kv"]], 2)
        self.directory = directory
        self.store = CachedAttentionStore(self.pool, 4 * self.pool.layout.stride, self.open_disk())
        self.registry = CollectorRegistry()
        collector = SimpleNamespace(
            labels=LABELS,
            _counter_cls=partial(Counter, registry=self.registry),
            _gauge_cls=lambda multiprocess_mode, **given: Gauge(registry=self.registry, **given),
            _histogram_cls=partial(Histogram, registry=self.registry),
        )
        self.configured = frozenset({"host", "disk"})
        self.metrics = StoreMetrics(self.store, collector, lambda: self.configured)  # type: ignore[arg-type]

    def open_disk(self) -> DiskTier:
        layout = self.pool.layout.component_bytes
        return DiskTier(self.directory, Fingerprint("m", "w", "float32", 2, layout, {}, {}), 4 << 20)

    def save(self, count: int) -> None:
        keys = [sha256(bytes([page])).digest() for page in range(count)]
        self.store.save(PageRun(None, 0, keys, torch.arange(2 * count)))
        assert self.store.flush(30) == 0

    def read(self) -> dict[tuple[str, frozenset[tuple[str, str]]], float]:
        self.metrics.publish()
        text = generate_latest(self.registry).decode()
        families = text_string_to_metric_families(text)
        return {(s.name, frozenset(s.labels.items())): s.value for family in families for s in family.samples}

    def value(self, name: str, **labels: str) -> float:
        wanted = {"model_name": "m", "tp_rank": "0", **labels}
        return self.read()[PREFIX + name, frozenset(wanted.items())]


@pytest.fixture
def published(tmp_path: Path) -> Iterator[Published]:
    published = Published(tmp_path)
    yield published
    published.store.close()


def test_counters_grow_by_what_is_new(published: Published) -> None:
    published.store.stats.prompt_ran(100, {"device": 0, "host": 64})
    for _ in range(2):
        assert published.value("hit_tokens_total", tier="host") == 64
    published.store.stats.prompt_ran(10, {"host": 2, "disk": 4})
    assert published.value("hit_tokens_total", tier="host") == 66
    assert published.value("hit_tokens_total", tier="disk") == 4
    assert published.value("prompt_tokens_total") == 110
    published.store.stats.left("host", Reason.TTL, 5)
    assert published.value("evicted_pages_total", tier="host", reason="ttl") == 5


def test_fill_and_transfers_come_from_the_store(published: Published) -> None:
    published.save(3)
    page_bytes = published.pool.layout.page_bytes
    for tier in ("host", "disk"):
        assert published.value("resident_pages", tier=tier) == 3
        assert published.value("resident_bytes", tier=tier) == 3 * page_bytes
    assert published.value("capacity_pages", tier="host") == 4
    assert published.value("transfer_bytes_total", direction="save", tier="host") == 3 * page_bytes
    assert published.value("transfer_seconds_count", direction="demote", tier="disk") == 1


def test_rates_can_see_the_first_transfer_and_the_first_eviction(published: Published) -> None:
    """A series that is not there before its first value has a rate of 0 then."""
    for direction, tier in (("save", "host"), ("load", "host"), ("demote", "disk"), ("fetch", "disk")):
        for name in ("transfer_seconds_count", "transfer_bytes_total", "transfer_pages_total"):
            assert published.value(name, direction=direction, tier=tier) == 0
    assert published.value("load_wait_seconds_count") == 0
    for tier in ("host", "disk"):
        assert published.value("evicted_pages_total", tier=tier, reason="room") == 0


def test_a_disk_that_is_gone_is_not_healthy_and_one_that_comes_back_counts_on(published: Published) -> None:
    disk = published.store.disk
    assert disk is not None
    disk._read_health.failed(OSError("bad sector"))
    assert published.value("tier_errors_total", tier="disk") == 1
    assert published.value("tier_healthy", tier="disk") == 1
    published.store.detach_disk()
    assert published.value("tier_healthy", tier="disk") == 0
    assert published.value("capacity_bytes", tier="disk") == 0
    published.configured = frozenset({"host"})
    assert published.value("tier_healthy", tier="disk") == 1, "an operator has detached it"
    published.configured = frozenset({"host", "disk"})
    published.store.replace_disk(published.open_disk)
    assert published.store.disk is not None
    assert published.value("tier_healthy", tier="disk") == 1
    published.store.disk._read_health.failed(OSError("bad sector"))
    assert published.value("tier_errors_total", tier="disk") == 2


def test_durations_are_told_one_by_one(published: Published) -> None:
    published.store.stats.load_waited(0.02)
    published.store.stats.load_waited(20.0)
    assert published.value("load_wait_seconds_count") == 2
    assert published.value("load_wait_seconds_sum") == pytest.approx(20.02)
    assert published.value("load_wait_seconds_bucket", le="0.03") == 1
    future: Future[int] = Future()
    published.store.stats.watch(Direction.FETCH, "disk", future, int)
    future.set_result(1)
    assert published.value("transfer_seconds_count", direction="fetch", tier="disk") == 1


def test_it_is_published_once_in_a_while(published: Published, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = SimpleNamespace(now=0.0)
    monkeypatch.setattr(metrics, "time", SimpleNamespace(monotonic=lambda: clock.now))
    times: list[float] = []
    monkeypatch.setattr(published.metrics, "publish", lambda: times.append(clock.now))
    for clock.now in (10.0, 10.5, 10.9, 11.0, 11.1, 15.0):
        published.metrics.poll()
    assert times == [10.0, 11.0, 15.0]


def test_nothing_but_numbers_and_known_labels_is_published(published: Published) -> None:
    published.save(2)
    known = {*LABELS, "le", *(label for metric in METRICS for label in metric.labels)}
    values = {"host", "disk", "device", *map(str, Direction), *map(str, Reason)}
    for _, labels in published.read():
        assert dict(labels).keys() <= known
        assert {value for label, value in labels if label in ("tier", "direction", "reason")} <= values
