"""Host memory: one arena of fixed-size page slots, pinned where there is a GPU."""

from __future__ import annotations

import torch

from cached_attention.layout import ALIGNMENT, PageLayout


class HostTier:
    """An arena of `capacity` page records and the list of its free slots.

    Raises:
        ValueError: `size` (bytes) does not hold one page.
    """

    def __init__(self, layout: PageLayout, size: int, pin_memory: bool = False) -> None:
        self.layout = layout
        self.capacity = size // layout.stride
        if self.capacity < 1:
            raise ValueError(f"{size} bytes of host memory hold no page of {layout.stride} bytes: give more.")
        arena = torch.empty(self.capacity * layout.stride + ALIGNMENT, dtype=torch.uint8, pin_memory=pin_memory)
        start = -arena.data_ptr() % ALIGNMENT
        self.arena = arena[start : start + self.capacity * layout.stride].view(self.capacity, layout.stride)
        """`[capacity, stride]`, uint8, aligned."""
        self._bytes = self.arena.numpy()
        self.clear()

    @property
    def free_slots(self) -> int:
        return len(self._free)

    def clear(self) -> None:
        """Take every slot back."""
        self._free = list(range(self.capacity - 1, -1, -1))

    def take_slot(self) -> int | None:
        return self._free.pop() if self._free else None

    def give_back(self, slot: int) -> None:
        self._free.append(slot)

    def give_back_all(self, slots: list[int]) -> None:
        self._free += slots

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

    def check_invariants(self, used: set[int]) -> None:
        """Raises AssertionError unless every slot is either free or in `used`, once."""
        free = set(self._free)
        assert len(free) == len(self._free), "a slot is free twice"
        assert not free & used, "a slot is free and in use"
        assert len(free) + len(used) == self.capacity, "slots leaked"
