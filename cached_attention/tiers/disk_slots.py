"""Which slots of a disk store are free."""

from __future__ import annotations

import heapq

FREE, WRITING, SAVED, REMOVING = range(4)
"""REMOVING: readers no longer see the page, but its index row may still be on disk."""


class SlotTable:
    """The state of every slot; allocates the lowest free one first, so that neighbours stay together.

    Args:
        states: FREE or SAVED for every slot.
        room: slots below this already have space on disk.
    """

    def __init__(self, states: bytearray, room: int) -> None:
        self.capacity = len(states)
        self.states = states
        self.free = states.count(FREE)
        self._fresh = max(room, self.states.rfind(SAVED) + 1)
        """Slots from here on are not allocated, unless their state says so."""
        self._recycled = [slot for slot in range(self._fresh) if self.states[slot] == FREE]

    @property
    def recycled(self) -> int:
        """Free slots that need no new space on disk."""
        return len(self._recycled)

    def take(self, count: int, may_grow: bool) -> list[int]:
        """Allocate up to `count` slots, in ascending order; they become WRITING."""
        taken: list[int] = []
        while len(taken) < count and self._recycled:
            taken.append(heapq.heappop(self._recycled))
        while may_grow and len(taken) < count and self._fresh < self.capacity:
            if self.states[self._fresh] == FREE:
                taken.append(self._fresh)
            self._fresh += 1
        for slot in taken:
            self.states[slot] = WRITING
        self.free -= len(taken)
        return taken

    def give_back(self, slot: int) -> None:
        assert self.states[slot] != FREE, f"slot {slot} is free already"
        self.states[slot] = FREE
        self.free += 1
        if slot < self._fresh:
            heapq.heappush(self._recycled, slot)

    def growth_ended(self, room: int) -> None:
        """Slots from `room` on have no space on disk for now."""
        self._fresh = min(self._fresh, room)
        self._recycled = [slot for slot in self._recycled if slot < room]
        heapq.heapify(self._recycled)

    def check_invariants(self) -> None:
        assert len(self.states) == self.capacity
        assert self.free == self.states.count(FREE), "free slots miscounted"
        recycled = set(self._recycled)
        assert len(recycled) == len(self._recycled), "a slot is free twice"
        assert recycled == {slot for slot in range(self._fresh) if self.states[slot] == FREE}, "slots leaked"
