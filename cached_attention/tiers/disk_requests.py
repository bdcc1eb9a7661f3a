"""What was asked of the disk and has not ended, and the slots that it decides about."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable
from pathlib import Path

from cached_attention.tiers.disk_rows import DiskRecord
from cached_attention.tiers.disk_slots import REMOVING, SAVED, SlotTable
from cached_attention.tiers.page_io import DiskStats, ReadOutcome, Ticket


class OpenRequests:
    """Reads, writes and removals in progress. All methods may be called from any thread.

    It is the `Outcome` of the committer, which says when writes and removals are durable.

    Args:
        has_space: whether a slot has space on disk already.
        most_writes: pages that may be on their way to the disk; more are declined.
        where: the store's directory, for messages.
    """

    def __init__(
        self,
        slots: SlotTable,
        has_space: Callable[[int], bool],
        stats: DiskStats,
        most_writes: int,
        where: Path,
    ) -> None:
        self._where = where
        self._slots = slots
        self._has_space = has_space
        self._stats = stats
        self._most_writes = most_writes
        self._lock = threading.Lock()
        self._writes: dict[int, tuple[Ticket[int | None], int]] = {}
        """By slot: the call, and the place of the page in it."""
        self._reads: set[Ticket[ReadOutcome]] = set()
        self.removing = 0
        """Slots that become free once the removal of their pages is durable."""

    @property
    def write_room(self) -> int:
        """Pages that may still be queued for writing."""
        return max(0, self._most_writes - len(self._writes))

    def begin_write(self, pages: int, *, accepts: bool, may_grow: bool) -> tuple[Ticket[int | None], list[int]]:
        """The ticket of a call with `pages` pages, and slots for the first ones; the others are declined.

        Args:
            accepts: whether any page is accepted.
            may_grow: whether slots without space on disk may be taken.
        """
        ticket = Ticket[int | None](pages, None)
        ticket.begin()
        with self._lock:
            slots = self._slots.take(min(pages, self.write_room), may_grow) if accepts else []
            self._writes.update((slot, (ticket, place)) for place, slot in enumerate(slots))
            self._stats.declined += pages - len(slots)
            for place in range(len(slots), pages):
                ticket.settle(place, None)
        if not slots:
            ticket.finish()
        return ticket, slots

    def begin_read(self, pages: int) -> Ticket[ReadOutcome]:
        """The ticket of a call with `pages` pages."""
        ticket = Ticket(pages, ReadOutcome.UNAVAILABLE)
        with self._lock:
            self._reads.add(ticket)
        return ticket

    def is_wanted(self, ticket: Ticket[ReadOutcome]) -> bool:
        """Whether the read was not cancelled; it cannot be from now on."""
        with self._lock:
            return ticket.begin()

    def begin_removal(self, slots: list[int]) -> None:
        """No reader may see these pages any more.

        Raises:
            ValueError: a slot holds no saved page.
        """
        states, capacity = self._slots.states, self._slots.capacity
        with self._lock:
            for slot in slots:
                if not (0 <= slot < capacity and states[slot] == SAVED):
                    raise ValueError(f"slot {slot} of {self._where} holds no saved page.")
                states[slot] = REMOVING
            self.removing += len(slots)

    def settle_reads(self, ticket: Ticket[ReadOutcome], outcomes: list[tuple[int, ReadOutcome]]) -> None:
        """Outcomes of some pages of a call, by their place in it."""
        with self._lock:
            if ticket not in self._reads:
                return
            for place, outcome in outcomes:
                ticket.settle(place, outcome)
                self._stats.lost += outcome is ReadOutcome.LOST
            if not ticket.settled:
                return
            self._reads.discard(ticket)
            ticket.begin()
        ticket.finish()

    def saved(self, records: list[DiskRecord]) -> None:
        self._settle_writes([record.slot for record in records], saved=True)

    def unsaved(self, records: list[DiskRecord]) -> None:
        self.failed([record.slot for record in records])

    def failed(self, slots: Iterable[int]) -> None:
        """The pages that were to be written to `slots` are not there."""
        self._settle_writes(slots, saved=False)

    def _settle_writes(self, slots: Iterable[int], saved: bool) -> None:
        done = []
        with self._lock:
            for slot in slots:
                if slot not in self._writes:
                    continue
                ticket, place = self._writes.pop(slot)
                if saved:
                    self._slots.states[slot] = SAVED
                else:
                    self._slots.give_back(slot, self._has_space(slot))
                    self._stats.failed += 1
                ticket.settle(place, slot if saved else None)
                if ticket.settled:
                    done.append(ticket)
        for ticket in done:
            ticket.finish()

    def removed(self, slots: list[int]) -> None:
        with self._lock:
            self.removing -= len(slots)
            for slot in slots:
                self._slots.give_back(slot, self._has_space(slot))

    def abandon(self) -> None:
        """End all requests with what is known of them: nothing that happens later counts."""
        with self._lock:
            tickets = {ticket for ticket, _ in self._writes.values()} | self._reads
            self._writes.clear()
            self._reads.clear()
            for ticket in tickets:
                ticket.begin()
        for ticket in tickets:
            ticket.finish()

    def check_invariants(self) -> bytes:
        """Returns the states of all slots; raises AssertionError if they disagree."""
        with self._lock:
            self._slots.check_invariants()
            return bytes(self._slots.states)
