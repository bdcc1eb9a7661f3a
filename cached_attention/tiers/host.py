"""Host memory: one arena of fixed-size page slots, pinned where there is a GPU."""

from __future__ import annotations

import torch

from cached_attention.layout import ALIGNMENT, PageLayout
from cached_attention.tiers.host_slots import HostSlots


class HostTier(HostSlots):
    """An arena of `capacity` page records.

    Raises:
        ValueError: `size` (bytes) does not hold one page.
    """

    def __init__(self, layout: PageLayout, size: int, pin_memory: bool = False) -> None:
        self.layout = layout
        capacity = size // layout.stride
        if capacity < 1:
            raise ValueError(f"{size} bytes of host memory hold no page of {layout.stride} bytes: give more.")
        super().__init__(capacity)
        arena = torch.empty(self.capacity * layout.stride + ALIGNMENT, dtype=torch.uint8, pin_memory=pin_memory)
        start = -arena.data_ptr() % ALIGNMENT
        self.arena = arena[start : start + self.capacity * layout.stride].view(self.capacity, layout.stride)
        """`[capacity, stride]`, uint8, aligned."""
        self._bytes = self.arena.numpy()

    def component(self, layer: int, component: int) -> torch.Tensor:
        """`[capacity, bytes]` view of one component of every slot."""
        start = self.layout.offsets()[layer][component]
        return self.arena[:, start : start + self.layout.component_bytes[layer][component]]

    def slot_bytes(self, slot: int) -> memoryview:
        """`stride` bytes, aligned: the record of a page and its padding."""
        return memoryview(self._bytes[slot])

    def record(self, slot: int) -> memoryview:
        """The bytes of a page, without padding."""
        return self.slot_bytes(slot)[: self.layout.page_bytes]
