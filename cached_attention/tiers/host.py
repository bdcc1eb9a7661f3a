"""Host memory: one arena of fixed-size page slots."""

from __future__ import annotations

import torch

from cached_attention.layout import PageLayout
from cached_attention.tiers.host_memory import HostMemory
from cached_attention.tiers.host_slots import HostSlots

CPU = torch.device("cpu")


class HostTier(HostSlots):
    """An arena of `capacity` page records, pinned if a GPU copies them.

    Args:
        size: bytes.
        device: the device that copies them.

    Raises:
        ValueError: `size` does not hold one page.
        HostMemoryError: there is not enough memory, or it cannot be pinned.
    """

    def __init__(self, layout: PageLayout, size: int, device: torch.device = CPU) -> None:
        self.layout = layout
        capacity = size // layout.stride
        if capacity < 1:
            raise ValueError(f"{size} bytes of host memory hold no page of {layout.stride} bytes: give more.")
        super().__init__(capacity)
        self._memory = HostMemory(self.capacity * layout.stride, layout.stride, device)
        self.arena = self._memory.bytes.view(self.capacity, layout.stride)
        """`[capacity, stride]`, uint8, aligned."""
        self._bytes = self.arena.numpy()

    def close(self) -> None:
        """Release the memory; no transfer may be running."""
        self._memory.close()

    def component(self, layer: int, component: int) -> torch.Tensor:
        """`[capacity, bytes]` view of one component of every slot."""
        start = self.layout.offsets()[layer][component]
        return self.arena[:, start : start + self.layout.component_bytes[layer][component]]

    def slot_bytes(self, slot: int) -> memoryview:
        """Record of a page and its padding: `stride` bytes, aligned."""
        return memoryview(self._bytes[slot])

    def record(self, slot: int) -> memoryview:
        """Record of a page, without padding."""
        return self.slot_bytes(slot)[: self.layout.page_bytes]
