"""Copies between the engine's KV pool and the arena: per layer on the way in, whole pages on the way out."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from itertools import accumulate, pairwise

import numpy as np
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
    """Streams all components of a page, or of a layer, in one call that leaves the interpreter to others."""

    def __init__(self, device: DevicePool, host: HostTier) -> None:
        super().__init__(device, host)
        # Compiled on import, for a second: only where it is used.
        from cached_attention.transfer.streaming import copy_rows

        self._stream = copy_rows
        self._capacity, self._num_pages = host.capacity, device.num_pages
        pairs = [pair for layer in self._pairs for pair in layer]
        self._device = _rows_of([buffer for buffer, _ in pairs])
        self._host = _rows_of([slots for _, slots in pairs])
        self._sizes = np.array([buffer.shape[1] for buffer, _ in pairs], dtype=np.intp)
        ends = [0, *accumulate(len(layer) for layer in self._pairs)]
        self._layers = [slice(*span) for span in pairwise(ends)]

    def load(self, layer: int, pages: Sequence[int], slots: Sequence[int]) -> None:
        of = self._layers[layer]
        rows = self._checked(pages, slots)
        self._stream(self._device[of], rows[0], self._host[of], rows[1], self._sizes[of])

    def save(self, pages: Sequence[int], slots: Sequence[int]) -> None:
        rows = self._checked(pages, slots)
        self._stream(self._host, rows[1], self._device, rows[0], self._sizes)

    def _checked(self, pages: Sequence[int], slots: Sequence[int]) -> list[np.ndarray]:
        if len(pages) != len(slots):
            raise ValueError(f"{len(pages)} pages and {len(slots)} slots: give as many of one as of the other.")
        rows = [np.array(numbers, dtype=np.intp) for numbers in (pages, slots)]
        for numbers, end in zip(rows, (self._num_pages, self._capacity), strict=True):
            if len(numbers) and not (numbers.min() >= 0 and numbers.max() < end):
                raise IndexError(f"page or slot {numbers.min()} to {numbers.max()}: they go from 0 to {end - 1}.")
        return rows


def _rows_of(arrays: Sequence[torch.Tensor]) -> np.ndarray:
    """`[arrays, 2]`: address of row 0 and bytes from row to row of `[rows, bytes]` byte tensors."""
    return np.array([(array.data_ptr(), array.stride(0)) for array in arrays], dtype=np.intp)


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
