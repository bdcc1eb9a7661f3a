"""Reports to the operator while the server runs: metrics, and an occasional line in the log."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

from cached_attention.activity import Activity

from .metrics import store_metrics

if TYPE_CHECKING:
    from sglang.srt.managers.scheduler import Scheduler

    from .linker import CachedAttentionLinker

logger = logging.getLogger(__name__)


class Reporting:
    """Reports on one scheduler's store. One rank writes the log for all that hold the same pages."""

    def __init__(self, scheduler: Scheduler, linker: CachedAttentionLinker) -> None:
        store = linker.store
        self._metrics = store_metrics(scheduler, store, lambda: linker.configured_tiers)
        speaks = scheduler.metrics_collector_context.is_stats_logging_rank
        self._activity = Activity(store.stats, store.layout.page_bytes) if speaks else None

    def poll(self) -> None:
        """Must be called in every scheduling pass; nearly always it only looks at the clock."""
        if self._metrics is not None:
            self._metrics.poll()
        if self._activity is not None and (line := self._activity.poll()) is not None:
            logger.info("CachedAttention, %s", line)
