"""The façade that an engine drives: look up, load, save, evict.

One thread, the engine's scheduler, calls the store; none of its calls waits for a transfer except
`reset`, `close` and `finish_load`. Transfers run on threads of their own and are seen by `poll`.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass

import torch

from cached_attention.chain import Chain, PageRun
from cached_attention.index import NOWHERE, PageIndex, PageKey
from cached_attention.layout import DevicePool
from cached_attention.policy.eviction import EvictionOrder
from cached_attention.tiers.host import HostTier
from cached_attention.transfer.copier import page_copier
from cached_attention.transfer.jobs import Event, LoadProgress, PageLoad, PageSave, Transfers


@dataclass
class StoreStats:
    """Counts since the store was made, in pages."""

    loaded: int = 0
    saved: int = 0
    declined: int = 0
    """Not saved: host memory was full of pages in use, or the page before was not in the store."""
    failed: int = 0
    """Saves whose copy failed."""
    evicted: int = 0


@dataclass
class _QueuedLoad:
    pages: PageLoad
    pinned: int
    """Row of the last page; pinning it keeps every page before it."""


class CachedAttentionStore:
    """A hierarchy of page records under one device pool, for one rank.

    Pages in the store are closed under prefixes: a page is admitted only after the one before it,
    and leaves only after all that follow it. So the length that can be restored is one number, and a
    pin on the last page protects the chain.

    Args:
        device: the engine's KV pool.
        host_size: bytes of host memory, at least one page.
        clock: seconds; comparable between restarts.
    """

    def __init__(self, device: DevicePool, host_size: int, *, clock: Callable[[], float] = time.time) -> None:
        self.layout = device.layout
        self.host = HostTier(self.layout, host_size, pin_memory=device.device.type == "cuda")
        self.stats = StoreStats()
        self._clock = clock
        self._transfers = Transfers(page_copier(device, self.host), self.host, self.layout.page_size)
        self._epoch = 0
        self._start_empty()

    def _start_empty(self) -> None:
        self._index = PageIndex("host")
        (self._in_host,) = self._index.tiers
        self._order = EvictionOrder(self._index, self._in_host)
        self._saves: deque[PageSave] = deque()
        self._finished_saves: deque[bool] = deque()
        self._reserved: dict[str, int] = {}
        self._queued: dict[str, _QueuedLoad] = {}
        self._loading: dict[int, tuple[Future[None], list[_QueuedLoad]]] = {}
        self._epoch += 1

    @property
    def resident_pages(self) -> int:
        """Pages in host memory, those still on their way included."""
        return self._in_host.pages

    @property
    def pins(self) -> int:
        """Holds on pages: one per reservation, per load, and per page on its way to the host."""
        return sum(self._index.pins)

    @property
    def saving(self) -> int:
        """Saves that have not ended."""
        return len(self._saves)

    # Looking up

    def restorable_pages(self, chain: Chain) -> int:
        """Leading pages of `chain` that a load would bring back. Constant time when nothing changed."""
        if chain.epoch != self._epoch:
            chain.epoch, chain.restorable = self._epoch, 0
        end = min(chain.restorable, len(chain.keys))
        while end and not self._is_ready(chain.keys[end - 1]):
            end -= 1
        while end < len(chain.keys) and self._is_ready(chain.keys[end]):
            end += 1
        chain.restorable = end
        return end

    def _is_ready(self, key: PageKey) -> bool:
        row = self._index.find(key)
        return row != NOWHERE and bool(self._in_host.ready[row])

    def reserve(self, request: str, chain: Chain) -> int:
        """Restorable pages of `chain`, kept until `end_pass`, so that a load of them cannot fail."""
        self._release(request)
        pages = self.restorable_pages(chain)
        if pages:
            row = self._index.find(chain.keys[pages - 1])
            self._index.last_use[row] = self._clock()
            self._index.pin(row)
            self._reserved[request] = row
        return pages

    def end_pass(self) -> None:
        """End of a scheduling pass: what was reserved and not loaded may be evicted again."""
        for request in list(self._reserved):
            self._release(request)

    def _release(self, request: str) -> None:
        if (row := self._reserved.pop(request, NOWHERE)) != NOWHERE:
            self._unpin(row)

    def _unpin(self, row: int) -> None:
        self._index.unpin(row)
        self._order.offer(row)

    # Loading

    def queue_load(self, request: str, keys: Sequence[PageKey], device_slots: torch.Tensor) -> bool:
        """Queue the pages `keys` (consecutive, reserved in this pass) for the next `start_load`.

        `device_slots`: `[len(keys) * page_size]`, integer, free for the load to write.

        Returns False, and queues nothing, when a page is not in the store.

        Raises:
            ValueError: the request has a load queued already.
        """
        if request in self._queued:
            raise ValueError(f"request {request!r} has a load queued already; cancel it first.")
        rows = [self._index.find(key) for key in keys]
        if not rows or any(row == NOWHERE or not self._in_host.ready[row] for row in rows):
            return False
        self._index.pin(rows[-1])
        slots = [self._in_host.slot[row] for row in rows]
        self._queued[request] = _QueuedLoad(PageLoad(device_slots, slots), rows[-1])
        return True

    def cancel_load(self, request: str) -> bool:
        """Drop a load that has not started; False when there is none."""
        self._release(request)
        load = self._queued.pop(request, None)
        if load is None:
            return False
        self._unpin(load.pinned)
        return True

    @property
    def has_queued_loads(self) -> bool:
        return bool(self._queued)

    def start_load(self, batch: int, progress: LoadProgress, after: Sequence[Event] = ()) -> None:
        """Start everything queued, layer by layer, as `batch`; `progress` is told on another thread.

        The copies wait for the events in `after`.
        """
        loads, self._queued = list(self._queued.values()), {}
        future = self._transfers.load([load.pages for load in loads], after, progress)
        self._loading[batch] = future, loads
        self.stats.loaded += sum(len(load.pages.host_slots) for load in loads)

    def finish_load(self, batch: int) -> None:
        """Wait until `batch` no longer touches memory, then let its pages go."""
        future, loads = self._loading.pop(batch)
        future.exception()
        for load in loads:
            self._unpin(load.pinned)

    # Saving

    def lacks_parent(self, run: PageRun) -> bool:
        """Whether the page before `run` is not in the store: then `run` must start earlier to be saved."""
        return run.parent is not None and not self._index.is_resident(run.parent)

    def save(self, run: PageRun, after: Sequence[Event] = ()) -> None:
        """Start saving the pages of `run` that are not in the store; the outcome comes through `poll`.

        Takes slots at once, evicting what is coldest, and never waits: what finds no slot is
        declined. The copies wait for the events in `after`. The device pages must stay as they are
        until the save is reported.
        """
        admitted, whole = self._admit(run)
        rows = [self._index.find(run.keys[page]) for page in admitted]
        slots = [self._in_host.slot[row] for row in rows]
        checksums = self._transfers.save(_pages_of(run, admitted, self.layout.page_size), slots, after)
        self._saves.append(PageSave(rows, whole, checksums))

    def _admit(self, run: PageRun) -> tuple[list[int], bool]:
        """Give a pinned slot to each page of `run` that lacks one, in order, until none is left.

        Returns the pages admitted and whether all of `run` is in the store now.
        """
        admitted: list[int] = []
        if self.lacks_parent(run):
            self.stats.declined += len(run.keys)
            return admitted, False
        now = self._clock()
        parent = run.parent
        for page, key in enumerate(run.keys):
            if not self._index.is_resident(key):
                slot = self._take_slot(parent)
                if slot is None:
                    self.stats.declined += len(run.keys) - page
                    return admitted, False
                row = self._index.add(key, parent, (run.first_page + page) * self.layout.page_size)
                self._index.place(row, self._in_host, slot)
                self._index.pin(row)
                admitted.append(page)
            self._index.last_use[self._index.find(key)] = now
            parent = key
        return admitted, True

    def _take_slot(self, before: PageKey | None) -> int | None:
        """A free slot, or that of the coldest page; never that of `before`, whose chain is being saved."""
        if not self.host.free_slots:
            row = NOWHERE if before is None else self._index.find(before)
            if row != NOWHERE:
                self._index.pin(row)
            victim = self._order.take()
            if victim is not None:
                self._displace(victim)
                self.stats.evicted += 1
            if row != NOWHERE:
                self._unpin(row)
        return self.host.take_slot()

    def _displace(self, row: int) -> None:
        parent = self._index.parent[row]
        self.host.give_back(self._index.displace(row, self._in_host))
        if parent != NOWHERE:
            self._order.offer(parent)

    def poll(self) -> int:
        """Take note of the saves that have ended; returns how many wait for `pop_save`."""
        while self._saves and self._saves[0].checksums.done():
            self._finish_save(self._saves.popleft())
        return len(self._finished_saves)

    def _finish_save(self, save: PageSave) -> None:
        if save.checksums.exception() is None:
            for row, checksum in zip(save.rows, save.checksums.result(), strict=True):
                self._index.checksum[row] = checksum
                self._in_host.ready[row] = True
                self._unpin(row)
            self.stats.saved += len(save.rows)
            self._finished_saves.append(save.whole)
        else:
            self._drop(save.rows)
            self._finished_saves.append(False)

    def _drop(self, rows: Sequence[int]) -> None:
        """Give up pages whose bytes never landed; pages saved after them may now follow a gap."""
        for row in reversed(rows):
            self._displace(row)
            self._unpin(row)
        self.stats.failed += len(rows)
        self._epoch += 1

    def pop_save(self) -> bool:
        """The outcome of the oldest save that `poll` counted: whether all its pages are in the store."""
        return self._finished_saves.popleft()

    # Life and death

    def reset(self) -> None:
        """Forget every page, after waiting for the transfers that run."""
        self._wait()
        self.host.clear()
        self._start_empty()

    def close(self) -> None:
        """Wait for the transfers that run and stop their threads."""
        self._wait()
        self._transfers.close()

    def _wait(self) -> None:
        for save in self._saves:
            save.checksums.exception()
        for future, _ in self._loading.values():
            future.exception()

    def check_invariants(self) -> None:
        """Walk everything; for tests and debugging.

        Raises:
            AssertionError: a slot or pin leaked, or a count disagrees.
        """
        self._index.check_invariants()
        rows = [row for row in self._index.rows() if row in self._in_host]
        self.host.check_invariants({self._in_host.slot[row] for row in rows})
        holders = len(self._reserved) + len(self._queued)
        holders += sum(len(loads) for _, loads in self._loading.values())
        holders += sum(len(save.rows) for save in self._saves)
        assert self.pins == holders, f"{self.pins} pins for {holders} holders"
        for row in rows:
            assert self._in_host.ready[row] or self._index.pins[row], "a page without bytes can be evicted"
            closed = not self._index.position[row] or self._index.parent[row] in self._in_host
            assert closed or self.stats.failed, "a page is in the store without the one before it"


def _pages_of(run: PageRun, pages: Sequence[int], page_size: int) -> PageRun:
    if len(pages) == len(run.keys):
        return run
    slots = run.device_slots.view(-1, page_size)[list(pages)].flatten()
    return PageRun(run.parent, run.first_page, [run.keys[page] for page in pages], slots)
