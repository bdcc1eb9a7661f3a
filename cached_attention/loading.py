"""Pages on their way from host memory to the device."""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from cached_attention.aliases import Aliases
from cached_attention.hierarchy import Hierarchy
from cached_attention.index import NOWHERE, PageKey
from cached_attention.stats import Direction, StoreStats
from cached_attention.transfer.jobs import Transfers
from cached_attention.transfer.layer_wise_load import LayerWiseLoad, PageLoad
from cached_attention.transfer.streams import Event

if TYPE_CHECKING:
    import torch

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
    """Pins pages in host memory from when they are reserved until a load of them has landed.

    Args:
        stats: counts loads that have landed, when `poll` notices them.
    """

    def __init__(self, pages: Hierarchy, transfers: Transfers, aliases: Aliases, stats: StoreStats) -> None:
        self._pages = pages
        self._transfers = transfers
        self._aliases = aliases
        self._stats = stats
        self._reserved: dict[str, int] = {}
        """Rows of last pages, as in `_QueuedLoad`."""
        self._queued: dict[str, _QueuedLoad] = {}
        self._running: dict[int, _Batch] = {}
        """By number: batches whose forwards have not been launched."""
        self._landing: list[_Batch] = []
        """Batches whose forwards have been launched; their bytes may not have moved yet."""

    @property
    def pins(self) -> int:
        """Number of pins held for reservations and for loads that have not ended."""
        started = sum(len(batch.pinned) for batch in self._started())
        return len(self._reserved) + len(self._queued) + started

    @property
    def has_queued(self) -> bool:
        return bool(self._queued)

    def _started(self) -> list[_Batch]:
        return [*self._running.values(), *self._landing]

    def reserve(self, request: str, last_row: int) -> None:
        """Pin the page of `last_row`, and so all before it, until `end_pass`."""
        self._pages.pin(last_row)
        self._reserved[request] = last_row

    def release(self, request: str) -> None:
        """Undo `reserve`, if it was called."""
        if (row := self._reserved.pop(request, NOWHERE)) != NOWHERE:
            self._pages.unpin(row)

    def end_pass(self) -> None:
        """Unpin what was reserved; loads that have been queued keep their own pins."""
        for request in list(self._reserved):
            self.release(request)

    def queue(
        self,
        request: str,
        keys: Sequence[PageKey],
        device_slots: torch.Tensor,
        indices_ready: Sequence[Event] | None,
    ) -> list[int]:
        """See `CachedAttentionStore.queue_load`; returns the rows of the pages, none if nothing was queued."""
        find, ready, slot = self._pages.index.find, self._pages.in_host.ready, self._pages.in_host.slot
        rows = list(map(find, keys))
        if not rows or any(row == NOWHERE or not ready[row] for row in rows):
            return []
        if request in self._queued:
            raise ValueError(f"request {request!r} has a load queued already; cancel it first.")
        self._pages.pin(rows[-1])
        deltas = list(map(self._pages.index.aliases.delta, rows))
        pages = PageLoad(device_slots, [slot[row] for row in rows], deltas)
        if indices_ready is not None:
            pages = pages._replace(numbers=self._transfers.read_numbers(device_slots, indices_ready))
        self._queued[request] = _QueuedLoad(pages, rows[-1])
        rotated = [key for key, delta in zip(keys, deltas, strict=True) if delta]
        self._aliases.loaded_rotated(request, rotated)
        return rows

    def cancel(self, request: str) -> bool:
        """Release what is held for `request`, except a running load; False if no load was queued."""
        self.release(request)
        load = self._queued.pop(request, None)
        if load is None:
            return False
        self._pages.unpin(load.pinned)
        self._aliases.ended(request)
        return True

    def start(self, number: int, after: Sequence[Event]) -> LayerWiseLoad:
        """See `CachedAttentionStore.start_load`."""
        queued, self._queued = list(self._queued.values()), {}
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
