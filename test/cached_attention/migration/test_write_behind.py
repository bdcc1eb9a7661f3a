"""How much is being written at a time, beside a disk and a clock that tests set."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import pytest

from cached_attention import admission
from cached_attention.hierarchy import Hierarchy
from cached_attention.migration.disk_write_behind import (
    BATCH_PAGES,
    BATCHES_IN_FLIGHT,
    RESERVE,
    SHARE,
    URGENT_BATCHES,
    DiskWriteBehind,
)
from cached_attention.simulator.cost import Cost
from cached_attention.simulator.disk import SimulatedDisk
from cached_attention.tiers.host_slots import HostSlots

LEAST, MOST = BATCH_PAGES * BATCHES_IN_FLIGHT, BATCH_PAGES * URGENT_BATCHES
LARGE = int(MOST / SHARE)
"""Host slots of which writes may hold as many as they ever do."""


class Disk(SimulatedDisk):
    """Frees slots at once, or when a test says so."""

    removing = 0
    frees_at_once = True

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.removed: list[int] = []

    def remove(self, slots: Iterable[int]) -> None:
        if self.frees_at_once:
            super().remove(slots)
        else:
            self.removed += slots
            self.removing = len(self.removed)


class Writing:
    """Pages that are wanted on a disk which takes a second for each."""

    def __init__(self, host_slots: int, dirty: int, disk_slots: int | None = None, rate: float = 1.0) -> None:
        self.now = 0.0
        self.saved = 0
        cost = Cost(page_bytes=1, disk_write=rate, disk_latency=0.0)
        self.disk = Disk(disk_slots or 2 * host_slots, cost, lambda: self.now)
        self.pages = Hierarchy(HostSlots(host_slots), has_disk=True)
        self.write_behind = DiskWriteBehind(self.pages, self.disk, 1)
        self.save(dirty)

    def save(self, pages: int, after: bytes | None = None) -> None:
        """`after`: the page that the first of them follows; without it they do not follow each other."""
        for _ in range(pages):
            self.saved += 1
            row = admission.admit(self.pages, key := f"page {self.saved}".encode(), after, 0)
            after = after and key
            assert row is not None
            self.pages.index.uses[row] = 1
            self.pages.index.last_use[row] = self.saved
            self.pages.land(row, clean=False)
            self.pages.unpin(row)

    def run_pass(self, seconds: float, reading: bool = False) -> int:
        """After `seconds`; returns the pages that are being written then."""
        self.now += seconds
        self.disk.advance()
        self.write_behind.poll(reading)
        return self.write_behind.rows_in_flight


def test_where_passes_are_long_more_is_written_at_a_time() -> None:
    writing = Writing(LARGE, LARGE // 2)
    assert writing.run_pass(0) == LEAST
    assert [writing.run_pass(MOST) for _ in range(3)] == [2 * LEAST, MOST, MOST]
    assert writing.run_pass(BATCH_PAGES / 2) == MOST, "the disk is busy"
    for _ in range(URGENT_BATCHES + BATCHES_IN_FLIGHT):
        writing.run_pass(BATCH_PAGES)
    assert writing.write_behind.rows_in_flight == LEAST
    writing.pages.check_invariants()


def test_they_hold_a_part_of_host_memory_at_most() -> None:
    writing = Writing(10 * LEAST, 5 * LEAST)
    assert {writing.run_pass(MOST) for _ in range(4)} == {LEAST}


def test_nothing_is_written_while_the_disk_reads_unless_the_reserve_is_short() -> None:
    writing = Writing(LARGE, LARGE // 2)
    assert writing.run_pass(0, reading=True) == 0
    writing = Writing(LARGE, int((1 - RESERVE) * LARGE) + 1)
    assert writing.run_pass(0, reading=True) == MOST


@pytest.mark.parametrize("seconds", [0.0, MOST])
def test_everything_is_written_in_the_end(seconds: float) -> None:
    writing = Writing(LARGE, LARGE // 2)
    while writing.pages.dirty.pages or writing.write_behind.rows_in_flight:
        writing.run_pass(seconds + 1)
    assert writing.pages.on_disk.pages == LARGE // 2
    assert not sum(writing.pages.index.pins)


FAST = 1e6
"""Pages per second."""


def test_what_a_full_disk_has_evicted_is_not_written_again_before_it_is_used() -> None:
    writing = Writing(LARGE, 0, disk_slots=LARGE // 4, rate=FAST)
    for _ in range(8):
        writing.save(LARGE // 16)
        for _ in range(20):
            writing.run_pass(1.0)
    assert writing.disk.written_pages == writing.saved == LARGE // 2, "pages were written twice"
    on_disk = writing.pages.rows_on_disk()
    assert len(on_disk) > LARGE // 4 - MOST
    assert min(writing.pages.index.last_use[row] for row in on_disk) > LARGE // 4, "the coldest pages stayed"
    evicted = writing.pages.index.find(b"page 1")
    assert evicted in writing.pages.in_host
    writing.pages.index.last_use[evicted] = writing.saved + 1
    writing.pages.mark_dirty(evicted)
    for _ in range(20):
        writing.run_pass(1.0)
    assert evicted in writing.pages.on_disk
    writing.pages.check_invariants()


def test_a_full_disk_takes_as_much_per_pass_as_another_one() -> None:
    writing = Writing(LARGE, LARGE // 2, disk_slots=LARGE // 2, rate=FAST)
    while writing.pages.dirty.pages:
        writing.run_pass(1.0)
    assert writing.run_pass(1.0) == writing.disk.free_slots == 0
    before = writing.disk.written_pages
    writing.save(4 * LEAST)
    for _ in range(10):
        writing.run_pass(0.001)
    assert writing.disk.written_pages - before == 4 * LEAST


def test_no_more_is_evicted_while_slots_become_free() -> None:
    writing = Writing(LARGE, LARGE // 2, disk_slots=LARGE // 2, rate=FAST)
    while writing.pages.dirty.pages:
        writing.run_pass(1.0)
    writing.disk.frees_at_once = False
    writing.save(4 * LEAST)
    for _ in range(10):
        writing.run_pass(1.0)
    assert writing.disk.removing <= MOST
    assert writing.pages.on_disk.pages == LARGE // 2 - writing.disk.removing


def test_what_is_written_after_pages_that_a_full_disk_has_evicted_brings_them_back() -> None:
    writing = Writing(LARGE, 0, disk_slots=LARGE // 4, rate=FAST)
    writing.save(1)
    writing.save(9, after=b"page 1")
    writing.save(LARGE // 2)
    for _ in range(40):
        writing.run_pass(1.0)
    chain = [writing.pages.index.find(b"page %d" % number) for number in range(1, 11)]
    assert not any(row in writing.pages.on_disk for row in chain)
    assert all(row in writing.pages.in_host for row in chain)
    for row in chain:
        writing.pages.index.last_use[row] = writing.saved + 1
    writing.save(2, after=b"page 10")
    for _ in range(40):
        writing.run_pass(1.0)
    chain += [writing.pages.index.find(b"page %d" % number) for number in (writing.saved - 1, writing.saved)]
    assert all(row in writing.pages.on_disk for row in chain), "what is on disk is no prefix"
    writing.pages.check_invariants()


def test_a_flush_waits_until_a_full_disk_has_made_room() -> None:
    writing = Writing(LARGE, LARGE // 2, disk_slots=LARGE // 2, rate=FAST)
    while writing.pages.dirty.pages:
        writing.run_pass(1.0)
    writing.disk.frees_at_once = False
    writing.save(10)

    def free_late() -> None:
        writing.now += 1.0
        writing.disk.advance()
        if writing.disk.removing:
            SimulatedDisk.remove(writing.disk, writing.disk.removed)
            writing.disk.removing, writing.disk.removed = 0, []

    settle = writing.write_behind.settle
    writing.write_behind.settle = lambda: (free_late(), settle())[1]  # type: ignore[method-assign, func-returns-value]
    assert writing.write_behind.flush(20.0) == 0
