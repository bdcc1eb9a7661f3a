"""Copies between the engine's KV pool and the arena: per layer on the way in, whole pages on the way out."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import NamedTuple

import torch

from cached_attention.layout import DevicePool
from cached_attention.position.delta_table import DeltaTables, rows_of
from cached_attention.position.rotation import Rotation, rotate
from cached_attention.tiers.host import HostTier


class Turns(NamedTuple):
    """How the pages of a load are rotated on their way."""

    rows: list[int]
    """Per page a row of `table`, `NO_ROTATION` for one that is copied as it is."""
    table: torch.Tensor
    """See `DeltaTables.build`."""


class PageCopier(ABC):
    """Runs on transfer threads; every call returns when the bytes have landed."""

    def __init__(self, device: DevicePool, host: HostTier, rotations: Sequence[Rotation | None]) -> None:
        self._rotations = rotations
        self._tables = DeltaTables(filter(None, rotations))
        self._pairs = [
            [(buffer, host.component(layer, i)) for i, buffer in enumerate(buffers)]
            for layer, buffers in enumerate(device.layers)
        ]

    @property
    def num_layers(self) -> int:
        return len(self._pairs)

    def turns(self, deltas: Sequence[int]) -> Turns | None:
        """What `load` needs for pages that are loaded so many tokens from where they were computed."""
        rows, distinct = rows_of(deltas)
        return Turns(rows, self._tables.build(distinct)) if distinct else None

    @abstractmethod
    def load(self, layer: int, pages: Sequence[int], slots: Sequence[int], turns: Turns | None = None) -> None:
        """Copy one layer of the records in `slots` into the device `pages`, its keys rotated by `turns`."""

    @abstractmethod
    def save(self, pages: Sequence[int], slots: Sequence[int]) -> None:
        """Copy all layers of the device `pages` into `slots`."""


class CpuCopier(PageCopier):
    """A memcpy per page and component: numpy releases the GIL and costs less per call than torch."""

    def __init__(self, device: DevicePool, host: HostTier) -> None:
        super().__init__(device, host)
        self._arrays = [[(buffer.numpy(), slots.numpy()) for buffer, slots in pairs] for pairs in self._pairs]

    def load(self, layer: int, pages: Sequence[int], slots: Sequence[int]) -> None:
        for device, host in self._arrays[layer]:
            for page, slot in zip(pages, slots, strict=True):
                device[page] = host[slot]

    def save(self, pages: Sequence[int], slots: Sequence[int]) -> None:
        for pairs in self._arrays:
            for device, host in pairs:
                for page, slot in zip(pages, slots, strict=True):
                    host[slot] = device[page]


class CudaCopier(PageCopier):
    """Asynchronous copies from and to pinned memory, each direction on a stream of its own."""

    def __init__(self, device: DevicePool, host: HostTier) -> None:
        super().__init__(device, host)
        self._load_stream = torch.cuda.Stream(device.device)
        self._save_stream = torch.cuda.Stream(device.device)

    def load(self, layer: int, pages: Sequence[int], slots: Sequence[int]) -> None:
        with torch.cuda.stream(self._load_stream):
            for device, host in self._pairs[layer]:
                for page, slot in zip(pages, slots, strict=True):
                    device[page].copy_(host[slot], non_blocking=True)
        self._load_stream.synchronize()

    def save(self, pages: Sequence[int], slots: Sequence[int]) -> None:
        with torch.cuda.stream(self._save_stream):
            for pairs in self._pairs:
                for device, host in pairs:
                    for page, slot in zip(pages, slots, strict=True):
                        host[slot].copy_(device[page], non_blocking=True)
        self._save_stream.synchronize()


def page_copier(device: DevicePool, host: HostTier) -> PageCopier:
    """The copier for the device that the pool lies on."""
    return CudaCopier(device, host) if device.device.type == "cuda" else CpuCopier(device, host)
