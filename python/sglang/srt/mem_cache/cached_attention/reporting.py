"""What an operator is told while the server runs: metrics, and a line in the log now and then."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

from cached_attention.activity import Activity
from cached_attention.store import CachedAttentionStore

from .metrics import store_metrics

if TYPE_CHECKING:
    from sglang.srt.managers.scheduler import Scheduler

logger = logging.getLogger(__name__)


class Reporting:
    """Of one scheduler's store. The log speaks for all ranks that hold the same pages."""

    def __init__(self, scheduler: Scheduler, store: CachedAttentionStore) -> None:
        self._metrics = store_metrics(scheduler, store)
        speaks = scheduler.metrics_collector_context.is_stats_logging_rank
        self._activity = Activity(store.stats, store.layout.page_bytes) if speaks else None

    def poll(self) -> None:
        """To be called in every scheduling pass; nearly always it only looks at the clock."""
        if self._metrics is not None:
            self._metrics.poll()
        if self._activity is not None and (line := self._activity.poll()) is not None:
            logger.info("CachedAttention, %s", line)
