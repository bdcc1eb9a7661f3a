"""Loads and saves in flight. Each direction has a stream, so that a load never queues behind a save."""

from __future__ import annotations

import time
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from typing import Any, NamedTuple

import torch

from cached_attention.chain import PageRun
from cached_attention.checksum import page_checksum
from cached_attention.tiers.host import HostTier
from cached_attention.transfer import cpu_stream, cuda_stream  # noqa: F401  Registers them.
from cached_attention.transfer.copier import Moves, PageCopier
from cached_attention.transfer.streams import Event, Op, Priority, make_stream

NO_CHECKSUM = 0
"""Of a page that never leaves memory."""
SAVED_AT_ONCE = 32 << 20
"""Bytes: about a millisecond of a PCIe link. Between two such parts a save makes way for loads."""
MAKE_WAY = 0.02
"""Seconds, at most, that a part of a save makes way. Its device pages cannot be freed as long as it waits."""


class PageLoad(NamedTuple):
    """One request's part of a load."""

    device_slots: torch.Tensor
    """`[pages * page_size]`, integer: token slots on the device."""
    host_slots: list[int]
    deltas: list[int]
    """Per page: tokens from where it was computed to where it is loaded."""


class PageSave(NamedTuple):
    """Pages on their way to the host; `landed` resolves to checksums when the last layer has."""

    rows: list[int]
    whole: bool
    """Whether every page of the run was taken; False when host memory was too full for the rest."""
    landed: Future[list[int]]


def device_pages(device_slots: torch.Tensor, page_size: int) -> torch.Tensor:
    """The pages that whole runs of `device_slots` fill, where these lie."""
    return device_slots[::page_size] // page_size


class Work:
    """Ops that belong together: after one has failed the rest is left out."""

    error: BaseException | None = None

    def step(self, op: Op) -> Op:
        def run() -> None:
            if self.error is None:
                try:
                    op()
                except BaseException as error:  # noqa: BLE001  The one who waits for the work is told.
                    self.error = error

        return run


class LayerWiseLoad(Work):
    """The pages of one batch on their way to the device.

    Which device slots may be written, and when? The load's slots were free when they were given to it, but
    the forward before, which may still run, can own some of them:

    - A request that ended is released when its last result is read; by then the next forward, which has it
      in its batch for one token more, is running. It reads all slots of that request and writes one.
    - A node of the tree is evicted when no request holds it. The forward of the request that held it last
      may be running.
    - A captured graph writes padding into slot 0, which is never given to anybody.
    - A save that reads slots holds the lock of their node until it is reported: they are not free.
    - An earlier load of slots that were freed since is in front, on the same stream.

    So a load waits for everything that was put on the forward's stream when it starts (`after`), which holds
    all forwards before its own: its own is launched later and waits for it, layer by layer. The same events
    say that the numbers in `device_slots` are computed. Whoever uses the slots next does so on the forward's
    stream, which has waited for the last layer (`CachedAttentionStore.finish_load`), or on the load's.
    """

    layers: Sequence[Event]
    """`layers[l]`: layer l of all pages is there, or will never be, see `error`."""

    def __init__(self, copier: PageCopier, loads: Sequence[PageLoad], page_size: int) -> None:
        self._copier = copier
        self._loads = loads
        self._page_size = page_size

    @property
    def pages(self) -> int:
        return sum(len(load.host_slots) for load in self._loads)

    def ops(self) -> list[Op]:
        steps: list[Op] = [self._prepare]
        steps += [partial(self._copy, layer) for layer in range(self._copier.num_layers)]
        return list(map(self.step, steps))

    def _prepare(self) -> None:
        slots = torch.cat([load.device_slots for load in self._loads])
        host_slots = [slot for load in self._loads for slot in load.host_slots]
        deltas = [delta for load in self._loads for delta in load.deltas]
        self._moves: Moves = self._copier.moves(device_pages(slots, self._page_size), host_slots, deltas)

    def _copy(self, layer: int) -> None:
        self._copier.load(layer, self._moves)

    def wait(self, stream: Any = None) -> None:
        """Let `stream`, or that of the calling thread, wait for all layers; see `Event.wait`."""
        self.layers[-1].wait(stream)

    @property
    def has_ended(self) -> bool:
        """Whether it touches memory no more."""
        return self.layers[-1].query()


class Transfers:
    """The two transfer streams of one rank, and the thread that ends saves.

    Loads are put on their stream by the thread that starts them: an event must have been recorded before the
    forward's stream can wait for it. Where nothing waits for the device, that is a launch per layer.

    Args:
        device: where the engine's pool lies.
        sealed: saves yield a checksum per page. Only pages that leave memory need one.
    """

    def __init__(
        self, copier: PageCopier, host: HostTier, device: torch.device, page_size: int, *, sealed: bool
    ) -> None:
        self._copier = copier
        self._host = host
        self._page_size = page_size
        self._sealed = sealed
        self._loads = make_stream(device, "load", Priority.HIGH)
        self._saves = make_stream(device, "save", Priority.LOW)
        self._saver = ThreadPoolExecutor(1, thread_name_prefix="cached-attention-save")
        self._last_load: LayerWiseLoad | None = None
        self._saved_at_once = max(1, SAVED_AT_ONCE // host.layout.page_bytes)

    def load(self, loads: Sequence[PageLoad], after: Sequence[Event]) -> LayerWiseLoad:
        """Start copying; waits for nothing."""
        load = LayerWiseLoad(self._copier, loads, self._page_size)
        for event in after:
            self._loads.wait(event)
        load.layers = self._loads.run(load.ops())[1:]
        self._last_load = load
        return load

    def save(
        self, run: PageRun, places: Sequence[int], slots: Sequence[int], after: Sequence[Event]
    ) -> Future[list[int]]:
        """Copy the pages at `places` of `run` into `slots`; resolves to their checksums."""
        return self._saver.submit(self._save, run, places, slots, after)

    def _save(
        self, run: PageRun, places: Sequence[int], slots: Sequence[int], after: Sequence[Event]
    ) -> list[int]:
        for event in after:
            self._saves.wait(event)
        of_run = self._read_pages(run.device_slots)
        pages = [of_run[place] for place in places]
        for first in range(0, len(pages), self._saved_at_once):
            part = slice(first, first + self._saved_at_once)
            self._make_way()
            self._end(partial(self._copier.save, pages[part], slots[part]))
        if not self._sealed:
            return [NO_CHECKSUM] * len(slots)
        keys = [run.keys[place] for place in places]
        return [page_checksum(key, self._host.record(slot)) for key, slot in zip(keys, slots, strict=True)]

    def _read_pages(self, device_slots: torch.Tensor) -> list[int]:
        pages: list[torch.Tensor] = []

        def read() -> None:
            there = device_pages(device_slots, self._page_size)
            here = torch.empty(there.shape, dtype=there.dtype, pin_memory=there.is_cuda)
            pages.append(here.copy_(there, non_blocking=True))

        self._end(read)
        return pages[0].tolist()

    def _end(self, op: Op) -> None:
        """Have `op` run on the stream of saves, and wait for its end on this thread, which is there for that."""
        work = Work()
        (ended,) = self._saves.run([work.step(op)])
        ended.synchronize()
        if work.error is not None:
            raise work.error

    def _make_way(self) -> None:
        """Somebody waits for a load, nobody for a save."""
        until = time.monotonic() + MAKE_WAY
        while (load := self._last_load) is not None and not load.has_ended and time.monotonic() < until:
            time.sleep(MAKE_WAY / 40)

    def close(self) -> None:
        """Let what runs finish; nothing new starts."""
        self._saver.shutdown(cancel_futures=True)
        self._loads.close()
        self._saves.close()
