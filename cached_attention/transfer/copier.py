"""Copies between the engine's KV pool and the arena: per layer on the way in, whole pages on the way out."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence

import torch

from cached_attention.kernels.rope_on_load import PagedComponent, PageMoves, RopeOnLoad
from cached_attention.layout import DevicePool
from cached_attention.position.rotation import Rotation
from cached_attention.tiers.host import HostTier

Rotations = Sequence[Rotation | None]
"""Per layer how its keys are rotated; None for one whose keys know no position."""


class PageCopier(ABC):
    """Runs on transfer threads; every call returns when the bytes have landed."""

    def __init__(self, device: DevicePool, host: HostTier, rotations: Rotations | None) -> None:
        self._rotating = None if rotations is None else rope_on_load(device, host, rotations)
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

    def moves(self, pages: Sequence[int], slots: Sequence[int], deltas: Sequence[int]) -> PageMoves:
        """What `load_rotated` needs to move records whose keys turn by so many tokens each."""
        assert self._rotating is not None, "no rotations were given, so every page has one position"
        return self._rotating.moves(pages, slots, deltas)

    def load_rotated(self, layer: int, moves: PageMoves) -> None:
        """As `load`, and keys rotated to their new positions in the same pass."""
        assert self._rotating is not None
        self._rotating.load(range(layer, layer + 1), moves)

    @abstractmethod
    def save(self, pages: Sequence[int], slots: Sequence[int]) -> None:
        """Copy all layers of the device `pages` into `slots`."""


class CpuCopier(PageCopier):
    """A memcpy per page and component: numpy releases the GIL and costs less per call than torch."""

    def __init__(self, device: DevicePool, host: HostTier, rotations: Rotations | None) -> None:
        super().__init__(device, host, rotations)
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

    def __init__(self, device: DevicePool, host: HostTier, rotations: Rotations | None) -> None:
        super().__init__(device, host, rotations)
        self._load_stream = torch.cuda.Stream(device.device)
        self._save_stream = torch.cuda.Stream(device.device)

    def load(self, layer: int, pages: Sequence[int], slots: Sequence[int]) -> None:
        with torch.cuda.stream(self._load_stream):
            for device, host in self._pairs[layer]:
                for page, slot in zip(pages, slots, strict=True):
                    device[page].copy_(host[slot], non_blocking=True)
        self._load_stream.synchronize()

    def moves(self, pages: Sequence[int], slots: Sequence[int], deltas: Sequence[int]) -> PageMoves:
        with torch.cuda.stream(self._load_stream):
            return super().moves(pages, slots, deltas)

    def load_rotated(self, layer: int, moves: PageMoves) -> None:
        with torch.cuda.stream(self._load_stream):
            super().load_rotated(layer, moves)
        self._load_stream.synchronize()

    def save(self, pages: Sequence[int], slots: Sequence[int]) -> None:
        with torch.cuda.stream(self._save_stream):
            for pairs in self._pairs:
                for device, host in pairs:
                    for page, slot in zip(pages, slots, strict=True):
                        host[slot].copy_(device[page], non_blocking=True)
        self._save_stream.synchronize()


def rope_on_load(device: DevicePool, host: HostTier, rotations: Rotations) -> RopeOnLoad:
    """Moves of whole layers; K, or the latent of MLA, comes first in each."""
    layers = []
    for layer, (buffers, rotation) in enumerate(zip(device.buffers, rotations, strict=True)):
        turns = [rotation, *[None] * (len(buffers) - 1)]
        records = [host.component(layer, component) for component in range(len(buffers))]
        layers.append([PagedComponent(*parts) for parts in zip(buffers, records, turns, strict=True)])
    return RopeOnLoad(layers, device.layout.page_size)


def page_copier(device: DevicePool, host: HostTier, rotations: Rotations | None = None) -> PageCopier:
    """The copier for the device that the pool lies on.

    Raises:
        ValueError: keys of this dtype or shape cannot be rotated.
    """
    kind = CudaCopier if device.device.type == "cuda" else CpuCopier
    return kind(device, host, rotations)
