"""Loads and saves in flight. Each direction has a stream, so that a load never queues behind a save."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from typing import NamedTuple

import torch

from cached_attention.chain import PageRun
from cached_attention.checksum import page_checksum
from cached_attention.index import PageKey
from cached_attention.tiers.host import HostTier
from cached_attention.transfer import cpu_stream, cuda_stream  # noqa: F401  Registers them.
from cached_attention.transfer.copier import PageCopier
from cached_attention.transfer.layer_wise_load import LayerWiseLoad, PageLoad
from cached_attention.transfer.page_numbers import PageNumbers
from cached_attention.transfer.streams import Event, Op, Priority, make_stream
from cached_attention.transfer.work import Step, Work

NO_CHECKSUM = 0
"""Checksum of a page that never leaves memory."""
SAVED_AT_ONCE = 32 << 20
"""Bytes per part of a save: about a millisecond on a PCIe link. Between two parts a save makes way for loads."""
SAVES_IN_FLIGHT = 2
"""Parts in flight."""
MAKE_WAY = 0.02
"""Maximum number of seconds that a part of a save makes way. Its device pages cannot be freed while it waits."""


class PageSave(NamedTuple):
    """Pages on their way to the host; `landed` resolves to their checksums when the last layer has landed."""

    rows: list[int]
    whole: bool
    """Whether every page of the run was taken; False if the rest was declined."""
    landed: Future[list[int]]


class Transfers:
    """The transfer streams of one rank, and the thread that completes saves.

    Loads are put on their stream by the thread that starts them: an event must have been recorded before the
    forward's stream can wait for it. As long as nothing waits for the device, that costs one launch per layer.

    Args:
        device: device of the engine's pool.
    """

    checksums = True
    """Whether saves compute one per page, which only pages that leave memory need."""

    def __init__(self, copier: PageCopier, host: HostTier, device: torch.device, page_size: int) -> None:
        self._copier = copier
        self._host = host
        self._page_size = page_size
        self._loads = make_stream(device, "load", Priority.HIGH)
        self._saves = make_stream(device, "save", Priority.LOW)
        self._numbers = make_stream(device, "numbers", Priority.HIGH) if copier.wants_numbers else None
        self._saver = ThreadPoolExecutor(1, "cached-attention-save", self._saves.serve_thread)
        self._last_load: tuple[Event, Event] | None = None
        """Two events: its copies have begun, and have ended."""
        self._saved_at_once = max(1, SAVED_AT_ONCE // host.layout.page_bytes)

    @property
    def copier(self) -> PageCopier:
        return self._copier

    def read_numbers(self, device_slots: torch.Tensor, after: Sequence[Event]) -> PageNumbers | None:
        """Start copying the page numbers of a load to the host after the events `after`; None if not needed."""
        if self._numbers is None:
            return None
        for event in after:
            self._numbers.wait(event)
        return PageNumbers(device_slots, self._page_size, self._numbers)

    def load(self, loads: Sequence[PageLoad], after: Sequence[Event]) -> LayerWiseLoad:
        """Start copying; waits for nothing."""
        load = LayerWiseLoad(self._copier, loads, self._page_size)
        for event in after:
            self._loads.wait(event)
        begun, *load.layers = self._loads.run(load.ops())
        self._last_load = begun, load.layers[-1]
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
        try:
            of_run = PageNumbers(run.device_slots, self._page_size, self._saves).wait_here().tolist()
            return self._save_in_parts([run.keys[i] for i in places], [of_run[i] for i in places], slots)
        except BaseException:
            # The slots are about to be reused: nothing may be written to them any more.
            self._saves.record().synchronize()
            raise

    def _save_in_parts(self, keys: Sequence[PageKey], pages: Sequence[int], slots: Sequence[int]) -> list[int]:
        """Copy each part while the checksums of the previous one are computed; returns all checksums."""
        checksums: list[int] = []
        parts = [slice(first, first + self._saved_at_once) for first in range(0, len(pages), self._saved_at_once)]
        running: deque[tuple[Step, slice]] = deque()
        while parts or running:
            if parts and len(running) < SAVES_IN_FLIGHT:
                part = parts.pop(0)
                self._make_way()
                step = self._start_saving(partial(self._copier.save, pages[part], slots[part]))
                running.append((step, part))
            else:
                step, part = running.popleft()
                step.wait_here()
                checksums += map(self._checksum, keys[part], slots[part])
        return checksums

    def _start_saving(self, op: Op) -> Step:
        work = Work()
        (ended,) = self._saves.run([work.step(op)])
        return Step(work, ended)

    def _checksum(self, key: PageKey, slot: int) -> int:
        return page_checksum(key, self._host.record(slot)) if self.checksums else NO_CHECKSUM

    def _make_way(self) -> None:
        """Let a load pass: requests wait for loads, not saves. Ignores loads that still wait for a forward."""
        until = time.monotonic() + MAKE_WAY
        while self._is_loading() and time.monotonic() < until:
            time.sleep(MAKE_WAY / 40)

    def _is_loading(self) -> bool:
        if (load := self._last_load) is None:
            return False
        begun, ended = load
        return begun.query() and not ended.query()

    def close(self) -> None:
        """Finish what is running; nothing new starts."""
        self._saver.shutdown(cancel_futures=True)
        self._loads.close()
        self._saves.close()
        if self._numbers is not None:
            self._numbers.close()
