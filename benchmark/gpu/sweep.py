"""How many thread blocks does a load by the kernel need? Fewer leave more of the GPU to the model."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from contextlib import closing
from typing import Any

import torch

from benchmark.gpu.outcome import Outcome
from benchmark.gpu.setting import Setting
from cached_attention.kernels.compilation import cuda_target, load_library
from cached_attention.kernels.copy_rows import RowCopies
from cached_attention.kernels.rope_on_load import BLOCKS, PagedComponent, RopeOnLoad
from cached_attention.layout import DevicePool
from cached_attention.position.rotation import Rotation
from cached_attention.tiers.host import HostTier

PAGE = 64
NUMBERS = (4, 8, 16, 32)


def sweep(setting: Setting, rotation: Rotation, size: int, rounds: int, outcome: Outcome) -> None:
    """A row per kernel and number of blocks, and a note. The copy engines take no part, whatever servers choose.

    Args:
        size: bytes per load, rounded down to whole pages of 64 tokens; at least one page.
    """
    library = load_library(cuda_target(torch.cuda.get_device_capability(setting.device)))
    if library is None:
        outcome.notes.append("loads with other numbers of blocks: not measured, the kernels were not compiled")
        return
    pages = max(1, size // (setting.kv_bytes * PAGE))
    sizes = (setting.shape.layers, 2, pages * PAGE, setting.shape.kv_heads, setting.head_dim)
    kv = torch.zeros(sizes, dtype=setting.dtype, device=setting.device)
    pool = DevicePool([list(layer) for layer in kv], PAGE)
    with closing(HostTier(pool.layout, pages * pool.layout.stride, pool.device)) as host:
        loads = Loads(pool, host, rotation, library)
        for kernel, load in (("verbatim", loads.verbatim), ("rotated", loads.rotated)):
            speeds = {}
            for blocks in NUMBERS:
                seconds = _median(load(blocks), rounds)
                speeds[blocks] = pages * pool.layout.page_bytes / seconds / 1e9
                row = {"sweep": kernel, "blocks": blocks, "page_tokens": PAGE, "gb_per_s": speeds[blocks]}
                outcome.rows.append(row)
            found = ", ".join(f"{blocks}: {speed:.1f}" for blocks, speed in speeds.items())
            outcome.notes.append(f"{kernel} loads by the kernel, GB/s by blocks ({BLOCKS} are used): {found}")


class Loads:
    """Loads of page i of the host into page i of the pool, layer by layer."""

    def __init__(self, pool: DevicePool, host: HostTier, rotation: Rotation, library: Any) -> None:
        self._layers = range(pool.layout.num_layers)
        pairs = [
            (buffer, host.component(layer, i))
            for layer in self._layers
            for i, buffer in enumerate(pool.layers[layer])
        ]
        self._copies = RowCopies(pairs, library)
        self._rows = torch.arange(pool.num_pages, dtype=torch.int32, device=pool.device)
        self._components = [
            [
                PagedComponent(keys, host.component(layer, 0), rotation),
                PagedComponent(values, host.component(layer, 1)),
            ]
            for layer, (keys, values) in enumerate(pool.buffers)
        ]

    def verbatim(self, blocks: int) -> Callable[[], None]:
        def load() -> None:
            for layer in self._layers:
                self._copies.by_cores(slice(2 * layer, 2 * layer + 2), self._rows, self._rows, blocks)
            torch.cuda.synchronize()

        return load

    def rotated(self, blocks: int) -> Callable[[], None]:
        kernel = RopeOnLoad(self._components, PAGE, blocks=blocks)
        count = len(self._rows)
        moves = kernel.moves(self._rows, range(count), [-PAGE] * count)

        def load() -> None:
            for layer in self._layers:
                kernel.load(range(layer, layer + 1), moves)
            torch.cuda.synchronize()

        return load


def _median(load: Callable[[], None], rounds: int) -> float:
    """Seconds, after a round to warm up."""
    seconds = []
    for _ in range(1 + rounds):
        started = time.perf_counter()
        load()
        seconds.append(time.perf_counter() - started)
    return statistics.median(seconds[1:])
