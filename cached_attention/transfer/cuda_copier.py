"""Copies between a pool on a GPU and pinned host memory. They are put on the current stream; nothing waits.

The numbers of device pages of a load stay on the device: reading them would hold the scheduler until the GPU
has computed them. So loads are made by a kernel, which reads them there. A save has a thread that knows them, and
is made by the copy engines where that is quicker.

On the device this takes 12 bytes per page of the loads and saves that run, and the table of deltas: with the
granularity of torch's allocator, 2 MiB per stream.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from itertools import accumulate, pairwise
from typing import Any

import torch

from cached_attention.kernels.compilation import cuda_target, load_library
from cached_attention.kernels.copy_rows import RowCopies
from cached_attention.kernels.rope_on_load import BLOCKS
from cached_attention.layout import DevicePool
from cached_attention.tiers.host import HostTier
from cached_attention.transfer.copier import Moves, PageCopier, Rotations, rope_on_load

logger = logging.getLogger(__name__)

SAVE_BLOCKS = 8
"""Nobody waits for a save: few of the GPU's cores are taken from the model."""
WORTH_CORES = 0.9
"""The kernel saves pages when it takes less than this part of the engines' time: those leave the cores alone.
Expected, until it was measured: engines from 64 KiB per page and component, since a copy costs an engine about
a microsecond, in which the link moves as much."""
PROBED_PAGES = 16
PROBES = 3


class CudaCopier(PageCopier):
    """Kernels for loads, kernels or copy engines for saves."""

    def __init__(self, device: DevicePool, host: HostTier, rotations: Rotations | None) -> None:
        super().__init__(device, host, rotations)
        self._device = device.device
        library = self._load_library()
        ends = [0, *accumulate(len(layer) for layer in self._pairs)]
        self._layers = [slice(*span) for span in pairwise(ends)]
        self._plain = None
        if library is None:
            # Without a compiler torch moves the pages. It reads page numbers on the CPU, and waits for them.
            self._plain = rope_on_load(device, host, rotations or [None] * self.num_layers)
            return
        pairs = [pair for layer in self._pairs for pair in layer]
        self._inwards = RowCopies(pairs, library)
        self._outwards = RowCopies([(slots, pages) for pages, slots in pairs], library)
        self._engines_save = self._compare(min(PROBED_PAGES, device.num_pages, host.capacity))

    def _load_library(self) -> Any | None:
        return load_library(cuda_target(torch.cuda.get_device_capability(self._device)))

    def _stream(self) -> int:
        return torch.cuda.current_stream(self._device).cuda_stream

    def moves(self, pages: torch.Tensor, slots: Sequence[int], deltas: Sequence[int] = ()) -> Moves:
        rotated = self._rotated(pages, slots, deltas)
        if self._plain is not None:
            return Moves(pages, slots, rotated or self._plain.moves(pages, slots, [0] * len(slots)))
        if rotated is not None:
            return Moves(pages, slots, rotated)
        return Moves(pages.to(self._device, torch.int32, non_blocking=True), self._upload(slots), None)

    def load(self, layer: int, moves: Moves) -> None:
        if self._plain is not None and moves.rotated is not None:
            self._plain.load(range(layer, layer + 1), moves.rotated)
        else:
            super().load(layer, moves)

    def _load(self, layer: int, moves: Moves) -> None:
        self._inwards.by_cores(self._layers[layer], moves.pages, moves.slots, BLOCKS)

    def save(self, pages: Sequence[int], slots: Sequence[int]) -> None:
        if self._plain is not None:
            for target, source in ((slot, page) for layer in self._pairs for page, slot in layer):
                for page, slot in zip(pages, slots, strict=True):
                    target[slot].copy_(source[page], non_blocking=True)
        elif self._engines_save:
            self._save_by_engines(pages, slots)
        else:
            self._save_by_cores(pages, slots)

    def _save_by_cores(self, pages: Sequence[int], slots: Sequence[int]) -> None:
        self._outwards.by_cores(slice(None), self._upload(slots), self._upload(pages), SAVE_BLOCKS)

    def _save_by_engines(self, pages: Sequence[int], slots: Sequence[int]) -> None:
        targets, sources = (torch.tensor(numbers, dtype=torch.int32) for numbers in (slots, pages))
        self._outwards.by_engines(targets, sources, self._stream())

    def _upload(self, numbers: Sequence[int]) -> torch.Tensor:
        rows = torch.tensor(numbers, dtype=torch.int32).pin_memory()
        return rows.to(self._device, non_blocking=True)

    def _compare(self, pages: int) -> bool:
        """Whether copy engines shall make the saves: measured once, before anything is in the arena."""
        rows = list(range(pages))
        stream = torch.cuda.Stream(self._device)
        try:
            with torch.cuda.stream(stream):
                engines, cores = (
                    _milliseconds(lambda save=save: save(rows, rows))  # type: ignore[misc]
                    for save in (self._save_by_engines, self._save_by_cores)
                )
        except RuntimeError as error:
            # A driver that knows no batches of copies.
            logger.info("CachedAttention: pages are saved by a kernel: %s", error)
            return False
        chosen = engines_are_worth_it(engines, cores)
        logger.info(
            "CachedAttention: pages are saved by %s (%d pages: %.2f ms by copy engines, %.2f ms by a kernel).",
            "copy engines" if chosen else "a kernel",
            pages,
            engines,
            cores,
        )
        return chosen


def engines_are_worth_it(engines: float, cores: float) -> bool:
    """The break-even: both took so long for the same pages."""
    return cores >= WORTH_CORES * engines


def _milliseconds(copy: Callable[[], None]) -> float:
    """The best of `PROBES` on the current stream, after one that does not count."""
    best = float("inf")
    for probe in range(1 + PROBES):
        started, ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        started.record()
        copy()
        ended.record()
        ended.synchronize()
        if probe:
            best = min(best, started.elapsed_time(ended))
    return best
