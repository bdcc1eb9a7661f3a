"""Copies between the engine's KV pool and the arena: per layer on the way in, whole pages on the way out."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence

import torch

from cached_attention.layout import DevicePool
from cached_attention.tiers.host import HostTier


class PageCopier(ABC):
    """Runs on transfer threads; every call returns when the bytes have landed."""

    def __init__(self, device: DevicePool, host: HostTier) -> None:
        self._pairs = [
            [(buffer, host.component(layer, i)) for i, buffer in enumerate(buffers)]
            for layer, buffers in enumerate(device.layers)
        ]

    @property
    def num_layers(self) -> int:
        return len(self._pairs)

    @abstractmethod
    def load(self, layer: int, pages: Sequence[int], slots: Sequence[int]) -> None:
        """Copy one layer of the records in `slots` into the device `pages`."""

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
