"""The store's metrics on SGLang's own `/metrics`, next to the scheduler's and with the same labels."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from cached_attention.metrics import (
    LOAD_WAIT_SECONDS,
    METRICS,
    TRANSFER_SECONDS,
    Kind,
    Metric,
    moves,
    read,
    tiers_of,
)
from cached_attention.stats import Direction
from cached_attention.store import CachedAttentionStore

if TYPE_CHECKING:
    from sglang.srt.managers.scheduler import Scheduler
    from sglang.srt.observability.metrics_collector import SchedulerMetricsCollector

PERIOD = 1.0
"""Seconds between two publications; Prometheus scrapes less often."""


class StoreMetrics:
    """Publishes the counts of one rank's store. Create it after SGLang has set up its multi-process directory.

    Args:
        collector: the scheduler's; provides the labels and the metric classes, which an embedding application may
            have replaced.
        configured: returns the tiers that the store is meant to have now. Those that it had stay, too.
    """

    def __init__(
        self,
        store: CachedAttentionStore,
        collector: SchedulerMetricsCollector,
        configured: Callable[[], frozenset[str]],
    ) -> None:
        import prometheus_client  # Chooses its storage on import.

        self._store = store
        self._labels: dict[str, Any] = dict(collector.labels)
        self._configured = configured
        self._tiers = configured() | tiers_of(store)
        self._classes = {
            Kind.COUNTER: collector._counter_cls or prometheus_client.Counter,
            Kind.GAUGE: collector._gauge_cls or prometheus_client.Gauge,
            Kind.HISTOGRAM: collector._histogram_cls or prometheus_client.Histogram,
        }
        self._families = {metric.name: self._family(metric) for metric in METRICS}
        self._children: dict[tuple[str, tuple[str, ...]], Any] = {}
        self._told: dict[tuple[str, tuple[str, ...]], float] = {}
        self._next = 0.0
        store.stats.observer = self

    def _family(self, metric: Metric) -> Any:
        extra: dict[str, Any] = {}
        if metric.kind is Kind.GAUGE:
            extra["multiprocess_mode"] = "mostrecent"
        elif metric.kind is Kind.HISTOGRAM:
            extra["buckets"] = metric.buckets
        names = [*self._labels, *metric.labels]
        return self._classes[metric.kind](
            name=metric.full_name, documentation=metric.help, labelnames=names, **extra
        )

    def _child(self, metric: Metric, values: tuple[str, ...]) -> Any:
        key = metric.name, values
        if key not in self._children:
            labels = self._labels | dict(zip(metric.labels, values, strict=True))
            self._children[key] = self._families[metric.name].labels(**labels)
        return self._children[key]

    def transferred(self, direction: Direction, tier: str, seconds: float) -> None:
        self._child(TRANSFER_SECONDS, (str(direction), tier)).observe(seconds)

    def load_waited(self, seconds: float) -> None:
        self._child(LOAD_WAIT_SECONDS, ()).observe(seconds)

    def poll(self) -> None:
        """Publish when it is time; to be called often, on the scheduler's thread."""
        now = time.monotonic()
        if now >= self._next:
            self._next = now + PERIOD
            self.publish()

    def publish(self) -> None:
        configured = self._configured()
        self._tiers |= tiers_of(self._store) | configured
        reading = read(self._store, self._tiers, configured)
        for move in moves(self._tiers):
            self._child(TRANSFER_SECONDS, move)
        self._child(LOAD_WAIT_SECONDS, ())
        for metric in METRICS:
            for labels, value in metric.read(reading).items():
                self._tell(metric, labels, value)

    def _tell(self, metric: Metric, labels: tuple[str, ...], value: float) -> None:
        key = metric.name, labels
        told = self._told.get(key)
        if value == told:
            return
        self._told[key] = value
        child = self._child(metric, labels)
        if metric.kind is Kind.GAUGE:
            child.set(value)
        else:
            # Less than before: a disk tier that was reopened counts from zero.
            child.inc(value if told is None or value < told else value - told)


def store_metrics(
    scheduler: Scheduler, store: CachedAttentionStore, configured: Callable[[], frozenset[str]]
) -> StoreMetrics | None:
    """None without `--enable-metrics`, and on ranks for which SGLang publishes no metrics either."""
    context = scheduler.metrics_collector_context
    if not context.current_scheduler_metrics_enabled or context.collector is None:
        return None
    return StoreMetrics(store, context.collector, configured)
