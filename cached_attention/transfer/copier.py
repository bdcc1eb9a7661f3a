"""Copies between the engine's KV pool and the arena: loads layer by layer, saves whole pages."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from functools import partial
from itertools import accumulate, pairwise

import numpy as np
import torch

from cached_attention.kernels.rope_on_load import PagedComponent, RopeOnLoad
from cached_attention.layout import DevicePool
from cached_attention.position.rotation import Rotation
from cached_attention.tiers.host import HostTier

Rotations = Sequence[Rotation | None]
"""Per layer: how its keys are rotated; None for layers without positions."""


Part = Callable[[int], None]
"""Copies one layer, given by number, of some pages of a load."""


class PageCopier(ABC):
    """Copies pages on a stream: on CUDA its calls return before the bytes have landed, otherwise after."""

    wants_numbers = False
    """Whether loads are faster if the numbers of their device pages are known on the host."""

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
    def moves(
        self, pages: torch.Tensor | np.ndarray, slots: Sequence[int], deltas: Sequence[int] = ()
    ) -> list[Part]:
        """What `load` needs to copy the records in `slots` into the device `pages`, made once for all layers.

        Args:
            pages: `[n]`, integer: a tensor on the pool's device, or an array if they are known on the host.
            deltas: per record: tokens by which its keys are rotated; empty: none are rotated.
        """

    def load(self, layer: int, moves: Sequence[Part]) -> None:
        """Copy one layer of all moves; keys that have a delta are rotated in the same pass."""
        for part in moves:
            part(layer)

    def _split(self, pages: np.ndarray, slots: np.ndarray, deltas: Sequence[int]) -> list[Part]:
        """Rotated pages go through the kernel; all others are copied verbatim, as fast as possible."""
        turns = np.array(deltas, bool) if len(deltas) else np.zeros(len(slots), bool)
        parts = []
        if not turns.all():
            parts.append(self._verbatim(pages[~turns], slots[~turns]))
        if turns.any():
            parts.append(self._turned(pages[turns].tolist(), slots[turns].tolist(), list(filter(None, deltas))))
        return parts

    @abstractmethod
    def _verbatim(self, pages: np.ndarray, slots: np.ndarray) -> Part:
        """Copies records as they are."""

    def _turned(self, pages: torch.Tensor | Sequence[int], slots: Sequence[int], deltas: Sequence[int]) -> Part:
        assert self._rotating is not None, "no rotations were given, so every page has one position"
        return by_kernel(self._rotating, pages, slots, deltas)

    @abstractmethod
    def save(self, pages: Sequence[int], slots: Sequence[int]) -> None:
        """Copy all layers of the device `pages` into `slots`."""


class CpuCopier(PageCopier):
    """Streams all components of a page, or of a layer, in one call that runs without the GIL."""

    def __init__(self, device: DevicePool, host: HostTier, rotations: Rotations | None) -> None:
        super().__init__(device, host, rotations)
        # Compiled on import, which takes a second: imported only where it is used.
        from cached_attention.transfer.streaming import copy_rows

        self._stream = copy_rows
        self._capacity, self._num_pages = host.capacity, device.num_pages
        pairs = [pair for layer in self._pairs for pair in layer]
        self._device = _rows_of([buffer for buffer, _ in pairs])
        self._host = _rows_of([slots for _, slots in pairs])
        self._sizes = np.array([buffer.shape[1] for buffer, _ in pairs], dtype=np.intp)
        ends = [0, *accumulate(len(layer) for layer in self._pairs)]
        self._layers = [slice(*span) for span in pairwise(ends)]

    def moves(
        self, pages: torch.Tensor | np.ndarray, slots: Sequence[int], deltas: Sequence[int] = ()
    ) -> list[Part]:
        targets, sources = self._checked(np.asarray(pages), slots)
        return self._split(targets, sources, deltas)

    def _verbatim(self, pages: np.ndarray, slots: np.ndarray) -> Part:
        return partial(self._stream_layer, pages, slots)

    def _stream_layer(self, pages: np.ndarray, slots: np.ndarray, layer: int) -> None:
        of = self._layers[layer]
        self._stream(self._device[of], pages, self._host[of], slots, self._sizes[of])

    def save(self, pages: Sequence[int], slots: Sequence[int]) -> None:
        rows = self._checked(pages, slots)
        self._stream(self._host, rows[1], self._device, rows[0], self._sizes)

    def _checked(self, pages: Sequence[int] | np.ndarray, slots: Sequence[int]) -> list[np.ndarray]:
        if len(pages) != len(slots):
            raise ValueError(f"{len(pages)} pages and {len(slots)} slots: give as many of one as of the other.")
        rows = [np.array(numbers, dtype=np.intp) for numbers in (pages, slots)]
        for numbers, end in zip(rows, (self._num_pages, self._capacity), strict=True):
            if len(numbers) and not (numbers.min() >= 0 and numbers.max() < end):
                raise IndexError(f"page or slot {numbers.min()} to {numbers.max()}: they go from 0 to {end - 1}.")
        return rows


def _rows_of(arrays: Sequence[torch.Tensor]) -> np.ndarray:
    """`[arrays, 2]`: address of row 0 and stride in bytes, for each of the `[rows, bytes]` byte tensors."""
    return np.array([(array.data_ptr(), array.stride(0)) for array in arrays], dtype=np.intp)


def by_kernel(
    kernel: RopeOnLoad, pages: torch.Tensor | Sequence[int], slots: Sequence[int], deltas: Sequence[int]
) -> Part:
    moves = kernel.moves(pages, slots, deltas)
    return lambda layer: kernel.load(range(layer, layer + 1), moves)


def rope_on_load(
    device: DevicePool, host: HostTier, rotations: Rotations, *, compiled: bool = True
) -> RopeOnLoad:
    """Moves whole layers and rotates the first component of each: K, or the latent of MLA."""
    layers = []
    for layer, (buffers, rotation) in enumerate(zip(device.buffers, rotations, strict=True)):
        turns = [rotation, *[None] * (len(buffers) - 1)]
        records = [host.component(layer, component) for component in range(len(buffers))]
        layers.append([PagedComponent(*parts) for parts in zip(buffers, records, turns, strict=True)])
    return RopeOnLoad(layers, device.layout.page_size, compiled=compiled)


def whole_pages(device: DevicePool, host: HostTier) -> RopeOnLoad:
    """Moves whole layers of any content without rotation: each page is one slot of bytes."""
    layers = [
        [PagedComponent(pages, host.component(layer, component)) for component, pages in enumerate(buffers)]
        for layer, buffers in enumerate(device.layers)
    ]
    return RopeOnLoad(layers, page_size=1, compiled=False)


def page_copier(device: DevicePool, host: HostTier, rotations: Rotations | None = None) -> PageCopier:
    """The copier for the device that the pool lies on.

    Raises:
        ValueError: keys of this dtype or shape cannot be rotated.
    """
    if device.device.type != "cuda":
        return CpuCopier(device, host, rotations)
    from cached_attention.transfer.cuda_copier import CudaCopier

    return CudaCopier(device, host, rotations)
