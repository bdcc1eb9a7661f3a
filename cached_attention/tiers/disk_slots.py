"""Which slots of a disk store are free."""

from __future__ import annotations

import heapq
from collections.abc import Iterable

FREE, WRITING, SAVED, REMOVING = range(4)
"""REMOVING: readers no longer see the page, but its index row may still be on disk."""


class SlotTable:
    """The state of every slot; allocates the lowest free one first, so that neighbours stay together.

    Args:
        states: FREE or SAVED for every slot.
        room: slots below this already have space on disk,
        missing: except for these ranges `[first, last)`.
    """

    def __init__(self, states: bytearray, room: int, missing: Iterable[tuple[int, int]] = ()) -> None:
        self.capacity = len(states)
        self.states = states
        self.free = states.count(FREE)
        self._fresh = max(room, self.states.rfind(SAVED) + 1)
        """Slots from here on are not allocated, unless their state says so."""
        self._bare = [slot for low, high in missing for slot in range(low, high) if states[slot] == FREE]
        """Free slots below that without space on disk."""
        bare = set(self._bare)
        self._recycled = [slot for slot in range(self._fresh) if states[slot] == FREE and slot not in bare]

    @property
    def recycled(self) -> int:
        """Free slots that need no new space on disk."""
        return len(self._recycled)

    def take(self, count: int, may_grow: bool) -> list[int]:
        """Allocate up to `count` slots, those with space on disk first; they become WRITING."""
        taken: list[int] = []
        while len(taken) < count and self._recycled:
            taken.append(heapq.heappop(self._recycled))
        while may_grow and len(taken) < count and self._bare:
            taken.append(heapq.heappop(self._bare))
        while may_grow and len(taken) < count and self._fresh < self.capacity:
            if self.states[self._fresh] == FREE:
                taken.append(self._fresh)
            self._fresh += 1
        for slot in taken:
            self.states[slot] = WRITING
        self.free -= len(taken)
        return taken

    def give_back(self, slot: int, has_space: bool) -> None:
        """The slot is free again; `has_space`: on disk, so that writing to it needs no more."""
        assert self.states[slot] != FREE, f"slot {slot} is free already"
        self.states[slot] = FREE
        self.free += 1
        if slot < self._fresh:
            heapq.heappush(self._recycled if has_space else self._bare, slot)

    def check_invariants(self) -> None:
        assert len(self.states) == self.capacity
        assert self.free == self.states.count(FREE), "free slots miscounted"
        below = [*self._recycled, *self._bare]
        assert len(set(below)) == len(below), "a slot is free twice"
        assert set(below) == {slot for slot in range(self._fresh) if self.states[slot] == FREE}, "slots leaked"
