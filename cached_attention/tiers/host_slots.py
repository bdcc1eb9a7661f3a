"""Which page slots of host memory are free."""

from __future__ import annotations

from collections.abc import Iterable


class HostSlots:
    """`capacity` slots, each of which holds one page record or nothing."""

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self.retired: set[int] = set()
        """Slots that are never used again: somebody may write to them at any time."""
        self.clear()

    @property
    def free_slots(self) -> int:
        return len(self._free)

    def clear(self) -> None:
        """Make every slot free."""
        self._free = [slot for slot in range(self.capacity - 1, -1, -1) if slot not in self.retired]

    def take_slot(self) -> int | None:
        return self._free.pop() if self._free else None

    def take_slots(self, most: int) -> list[int]:
        """Up to `most` slots, as if from repeated calls of `take_slot`."""
        kept = max(0, len(self._free) - most)
        taken = self._free[kept:]
        del self._free[kept:]
        return taken[::-1]

    def give_back(self, slot: int) -> None:
        self.give_back_all([slot])

    def give_back_all(self, slots: list[int]) -> None:
        self._free += [slot for slot in slots if slot not in self.retired] if self.retired else slots

    def retire(self, slots: Iterable[int]) -> None:
        """Never use these slots again, which are in use."""
        self.retired.update(slots)

    def slot_bytes(self, slot: int) -> memoryview:
        """Record of a page; empty here, where slots are only counted."""
        return memoryview(b"")

    def check_invariants(self, used: set[int]) -> None:
        """Raise AssertionError unless every slot is either free or in `used`, exactly once."""
        free = set(self._free)
        assert len(free) == len(self._free), "a slot is free twice"
        assert not free & used, "a slot is free and in use"
        assert len(free) + len(used | self.retired) == self.capacity, "slots leaked"
