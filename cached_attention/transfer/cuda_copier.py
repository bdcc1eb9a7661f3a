"""Copies between a pool on a GPU and pinned host memory. They are put on the current stream; nothing waits.

There are two ways. A kernel reads and writes host memory directly: it needs one launch for any number of pages,
and can rotate keys. The copy engines leave the GPU's cores to the model, but need one copy per page and
component, with addresses known on the host. Which way is faster, and from which page size on, depends on the
machine: it is measured at start-up, for saves and for loads, on this server's own pages.

The numbers of the device pages of a load are computed on the device. They are copied to the host when the load is
queued (`PageNumbers`), and have usually arrived when it starts. Nothing waits for them: a load that starts before
they have arrived uses the kernel, which reads them on the device. A page whose keys are rotated is always loaded
by the kernel.

This takes 12 bytes of device memory per page of the running loads and saves, plus the table of deltas: with the
granularity of torch's allocator, 2 MiB per stream.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from functools import partial
from itertools import accumulate, pairwise
from typing import Any, NamedTuple

import numpy as np
import torch

from cached_attention.kernels.compilation import cuda_target, load_library
from cached_attention.kernels.copy_rows import RowCopies
from cached_attention.kernels.rope_on_load import BLOCKS, RopeOnLoad
from cached_attention.layout import DevicePool
from cached_attention.tiers.host import HostTier
from cached_attention.transfer.copier import PageCopier, Part, Rotations, by_kernel, rope_on_load, whole_pages

logger = logging.getLogger(__name__)

SAVE_BLOCKS = 8
"""Thread blocks of a save: few, because no request waits for a save and the model needs the GPU's cores."""
WORTH_CORES = 0.9
"""The kernel is used if it takes less than this fraction of the copy engines' time, as those leave the cores to
the model. Expected, before any measurement: engines from 64 KiB per page and component on, since a copy costs an
engine about a microsecond, in which the link moves that much."""
PROBED_PAGES = 16
PROBES = 3
"""Measurements per way and direction, after one to warm up: 16 times 16 pages in all, which for pages of 64
tokens of Llama-3-8B are 2 GiB, and take less than 0.1 s on a PCIe 5.0 link."""


class Time(NamedTuple):
    """Duration of a transfer, in milliseconds."""

    on_device: float
    """From its start to its end."""
    on_host: float
    """Until all of it is issued."""

    def __str__(self) -> str:
        return f"{self.on_device:.2f} ms and {self.on_host:.2f} ms to hand over"


class Way(NamedTuple):
    """Durations for the same pages in one of the two ways."""

    saves: Time
    loads: Time


class ByEngines(NamedTuple):
    """Which transfers use the copy engines."""

    saves: bool
    loads: bool


class Comparison(NamedTuple):
    """What both ways took for the same pages when the server started, and what was chosen."""

    pages: int
    engines: Way | RuntimeError
    """The error if the driver cannot copy in batches."""
    cores: Way
    chosen: ByEngines

    def lines(self) -> list[str]:
        """A sentence each about saves and loads."""
        return [self._line(what, by_engines) for what, by_engines in self.chosen._asdict().items()]

    def _line(self, what: str, by_engines: bool) -> str:
        engines = self.engines if isinstance(self.engines, RuntimeError) else getattr(self.engines, what)
        return (
            f"{what} are made by {'copy engines' if by_engines else 'a kernel'} ({self.pages} pages: "
            f"copy engines {engines}, a kernel {getattr(self.cores, what)})."
        )


class CudaCopier(PageCopier):
    """Copies with kernels or copy engines."""

    comparison: Comparison | None = None
    """None if no kernel can be used."""

    def __init__(self, device: DevicePool, host: HostTier, rotations: Rotations | None) -> None:
        super().__init__(device, host, rotations)
        self._device = device.device
        ends = [0, *accumulate(len(layer) for layer in self._pairs)]
        self._layers = [slice(*span) for span in pairwise(ends)]
        self._plain: RopeOnLoad | None = None
        chosen = self._choose_ways(min(PROBED_PAGES, device.num_pages, host.capacity))
        if chosen is None:
            # torch copies the pages. It reads page numbers on the CPU, and waits for them.
            logger.error(
                "CachedAttention: each load stops the scheduler until it has ended: no kernel can be used."
            )
            self._plain = (
                whole_pages(device, host)
                if rotations is None
                else rope_on_load(device, host, rotations, compiled=False)
            )
            chosen = ByEngines(saves=False, loads=False)
        self._engines = chosen
        self.wants_numbers = chosen.loads

    def _choose_ways(self, probed_pages: int) -> ByEngines | None:
        """Which transfers use the copy engines; None if no kernel can be used for the others."""
        if (library := self._load_library()) is None:
            return None
        pairs = [pair for layer in self._pairs for pair in layer]
        self._inwards = RowCopies(pairs, library)
        self._outwards = RowCopies([(slots, pages) for pages, slots in pairs], library)
        return self._compare(list(range(probed_pages)))

    def _load_library(self) -> Any | None:
        return load_library(cuda_target(torch.cuda.get_device_capability(self._device)))

    def _stream(self) -> int:
        return torch.cuda.current_stream(self._device).cuda_stream

    def moves(
        self, pages: torch.Tensor | np.ndarray, slots: Sequence[int], deltas: Sequence[int] = ()
    ) -> list[Part]:
        if self._plain is not None:
            pages = torch.as_tensor(pages)
            return [by_kernel(self._plain, pages, slots, deltas or [0] * len(slots))]
        if isinstance(pages, np.ndarray):
            return self._split(pages, np.array(slots), deltas)
        if any(deltas):
            return [self._turned(pages, slots, deltas)]
        numbers = pages.to(self._device, torch.int32, non_blocking=True)
        return [partial(self._load_by_cores, numbers, self._upload(slots))]

    def _verbatim(self, pages: np.ndarray, slots: np.ndarray) -> Part:
        targets, sources = (torch.from_numpy(rows.astype(np.int32)) for rows in (pages, slots))
        return partial(self._load_by_engines, targets, sources)

    def _load_by_engines(self, pages: torch.Tensor, slots: torch.Tensor, layer: int) -> None:
        self._inwards.by_engines(self._layers[layer], pages, slots, self._stream())

    def _load_by_cores(self, pages: torch.Tensor, slots: torch.Tensor, layer: int) -> None:
        self._inwards.by_cores(self._layers[layer], pages, slots, BLOCKS)

    def save(self, pages: Sequence[int], slots: Sequence[int]) -> None:
        if self._plain is not None:
            for target, source in ((slot, page) for layer in self._pairs for page, slot in layer):
                for page, slot in zip(pages, slots, strict=True):
                    target[slot].copy_(source[page], non_blocking=True)
        elif self._engines.saves:
            self._save_by_engines(pages, slots)
        else:
            self._save_by_cores(pages, slots)

    def _save_by_cores(self, pages: Sequence[int], slots: Sequence[int]) -> None:
        self._outwards.by_cores(slice(None), self._upload(slots), self._upload(pages), SAVE_BLOCKS)

    def _save_by_engines(self, pages: Sequence[int], slots: Sequence[int]) -> None:
        targets, sources = (torch.tensor(numbers, dtype=torch.int32) for numbers in (slots, pages))
        self._outwards.by_engines(slice(None), targets, sources, self._stream())

    def _upload(self, numbers: Sequence[int]) -> torch.Tensor:
        rows = torch.tensor(numbers, dtype=torch.int32).pin_memory()
        return rows.to(self._device, non_blocking=True)

    def _compare(self, rows: list[int]) -> ByEngines | None:
        """Measure once, while nobody uses the pool. Page i is copied to slot i and back, so it stays as it is."""
        stream = torch.cuda.Stream(self._device)
        stream.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(stream):
            engines, cores = self._try_ways(rows)
        if isinstance(cores, RuntimeError):
            logger.warning("CachedAttention: the kernel that moves pages does not run on this GPU: %s", cores)
            return None  # Some loads need it: those whose page numbers are not known in time, and rotated pages.
        self.comparison = Comparison(len(rows), engines, cores, choose(engines, cores))
        for line in self.comparison.lines():
            logger.info("CachedAttention: %s", line)
        return self.comparison.chosen

    def _try_ways(self, rows: list[int]) -> tuple[Way | RuntimeError, Way | RuntimeError]:
        """What the copy engines and the kernel take for `rows`, on the current stream."""
        return (
            self._measure(self._save_by_engines, lambda: np.array(rows), rows),
            self._measure(self._save_by_cores, lambda: self._upload(rows).long(), rows),
        )

    def _measure(
        self,
        save: Callable[[Sequence[int], Sequence[int]], None],
        find_pages: Callable[[], torch.Tensor | np.ndarray],
        rows: list[int],
    ) -> Way | RuntimeError:
        try:
            pages = find_pages()
            return Way(_time(partial(save, rows, rows)), _time(partial(self._load_all, pages, rows)))
        except RuntimeError as error:
            return error.with_traceback(None)  # `comparison` keeps it, and must not keep the tensors of the call.

    def _load_all(self, pages: torch.Tensor | np.ndarray, slots: list[int]) -> None:
        moves = self.moves(pages, slots)
        for layer in range(self.num_layers):
            self.load(layer, moves)


def choose(engines: Way | RuntimeError, cores: Way) -> ByEngines:
    """Choose by what both ways took for the same pages. A driver without batched copies has no engines."""
    if isinstance(engines, RuntimeError):
        return ByEngines(saves=False, loads=False)
    # Saves are issued on a thread of their own, loads on the scheduler's thread, whose time counts too.
    return ByEngines(
        saves=engines_are_worth_it(engines.saves.on_device, cores.saves.on_device),
        loads=engines_are_worth_it(sum(engines.loads), sum(cores.loads)),
    )


def engines_are_worth_it(engines: float, cores: float) -> bool:
    """Whether copy engines, which leave the cores to the model, are fast enough; both in milliseconds."""
    return cores >= WORTH_CORES * engines


def _time(copy: Callable[[], None]) -> Time:
    """The best of `PROBES` runs on the current stream, after one to warm up."""
    best = Time(float("inf"), float("inf"))
    for probe in range(1 + PROBES):
        started, ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        began = time.perf_counter()
        started.record()
        copy()
        ended.record()
        on_host = 1e3 * (time.perf_counter() - began)
        ended.synchronize()
        if probe:
            best = Time(min(best.on_device, started.elapsed_time(ended)), min(best.on_host, on_host))
    return best
