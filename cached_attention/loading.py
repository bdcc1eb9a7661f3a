"""Pages on their way from host memory to the device."""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from typing import Any, NamedTuple

from cached_attention.hierarchy import Hierarchy
from cached_attention.stats import Direction, StoreStats
from cached_attention.transfer.jobs import Transfers
from cached_attention.transfer.layer_wise_load import LayerWiseLoad, PageLoad
from cached_attention.transfer.streams import Event

logger = logging.getLogger(__name__)


class _QueuedLoad(NamedTuple):
    pages: PageLoad
    pinned: int
    """Row of the last page; pinning it keeps every page before it."""


class _Batch(NamedTuple):
    load: LayerWiseLoad
    pinned: list[int]
    """As in `_QueuedLoad`, one per request."""
    started: float
    """Seconds on the monotonic clock."""


class Loads:
    """Pins the pages of loads in host memory from when they are queued until they have landed.

    Args:
        stats: counts loads that have landed, when `poll` notices them.
    """

    def __init__(self, pages: Hierarchy, transfers: Transfers, stats: StoreStats) -> None:
        self._pages = pages
        self._transfers = transfers
        self._stats = stats
        self.queued: dict[str, _QueuedLoad] = {}
        self._running: dict[int, _Batch] = {}
        """By number: batches whose forwards have not been launched."""
        self._landing: list[_Batch] = []
        """Batches whose forwards have been launched; their bytes may not have moved yet."""

    @property
    def pins(self) -> int:
        """Number of pins held for loads that have not ended."""
        return len(self.queued) + sum(len(batch.pinned) for batch in self._started())

    def _started(self) -> list[_Batch]:
        return [*self._running.values(), *self._landing]

    def queue(self, request: str, pages: PageLoad, last_row: int, indices_ready: Sequence[Event] | None) -> None:
        """See `CachedAttentionStore.queue_load`."""
        if request in self.queued:
            raise ValueError(f"request {request!r} has a load queued already; cancel it first.")
        self._pages.pin(last_row)
        if indices_ready is not None:
            pages = pages._replace(numbers=self._transfers.read_numbers(pages.device_slots, indices_ready))
        self.queued[request] = _QueuedLoad(pages, last_row)

    def cancel(self, request: str) -> bool:
        """False if nothing is queued for `request`."""
        load = self.queued.pop(request, None)
        if load is None:
            return False
        self._pages.unpin(load.pinned)
        return True

    def start(self, number: int, after: Sequence[Event]) -> LayerWiseLoad:
        """See `CachedAttentionStore.start_load`."""
        queued, self.queued = list(self.queued.values()), {}
        load = self._transfers.load([load.pages for load in queued], after)
        self._running[number] = _Batch(load, [load.pinned for load in queued], time.monotonic())
        return load

    def finish(self, number: int, stream: Any) -> bool:
        """See `CachedAttentionStore.finish_load`."""
        batch = self._running.pop(number)
        batch.load.wait(stream)
        self._landing.append(batch)
        self.poll()
        if (error := batch.load.error) is not None:
            logger.error("CachedAttention: a load of %d pages failed.", batch.load.pages, exc_info=error)
        return error is None

    def poll(self) -> None:
        """Unpin the pages of batches that have landed. Batches land in order."""
        while self._landing and self._landing[0].load.has_ended:
            self._landed(self._landing.pop(0))

    def _landed(self, batch: _Batch) -> None:
        for row in batch.pinned:
            self._pages.unpin(row)
        if batch.load.error is None:
            seconds = time.monotonic() - batch.started
            self._stats.transferred(Direction.LOAD, "host", batch.load.pages, seconds)

    def wait(self) -> None:
        """Wait until no load touches memory."""
        for batch in self._started():
            batch.load.layers[-1].synchronize()
