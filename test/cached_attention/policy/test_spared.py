"""What is on no disk yet goes after all else that no request wants."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from cached_attention import admission
from cached_attention.hierarchy import Hierarchy
from cached_attention.index import NOWHERE
from cached_attention.tiers.host_slots import HostSlots

SLOTS = 8


def key(number: int) -> bytes:
    return number.to_bytes(2, "big")


def fill(pages: Hierarchy, numbers: range) -> None:
    """Pages without parents that no disk holds, each used after the one before it."""
    for number in numbers:
        row = admission.admit(pages, key(number), None, 0)
        assert row is not None
        pages.index.last_use[row] = float(number)
        pages.land(row, clean=False)
        pages.unpin(row)


def write(pages: Hierarchy, number: int) -> None:
    row = pages.index.find(key(number))
    pages.mark_clean(row)
    pages.settle_on_disk(row, slot=number)


@settings(max_examples=60, deadline=None)
@given(written=st.sets(st.integers(0, SLOTS - 1)), new=st.integers(1, SLOTS), between=st.booleans())
def test_pages_on_disk_leave_host_memory_first(written: set[int], new: int, between: bool) -> None:
    pages = Hierarchy(HostSlots(SLOTS), has_disk=True)
    fill(pages, range(SLOTS))
    if between:
        admission.make_room(pages, 1, None)  # Before anything is written: what was spared then is found again.
    gone = [number for number in range(SLOTS) if not pages.is_kept(key(number))]
    for number in sorted(written.difference(gone)):
        write(pages, number)
    admission.make_room(pages, new, None)
    rows = {number: pages.index.find(key(number)) for number in range(SLOTS)}
    left = [number for number, row in rows.items() if row != NOWHERE and row in pages.in_host]
    assert len(left) == SLOTS - max(new, len(gone))
    clean = [number for number in left if number in written]
    dirty_lost = [n for n in range(SLOTS) if n not in written and n not in left and n not in gone]
    assert not (clean and dirty_lost), "a page was lost while another had a copy on disk"
    pages.check_invariants()


def test_where_nothing_is_written_the_coldest_goes() -> None:
    pages = Hierarchy(HostSlots(SLOTS), has_disk=True)
    fill(pages, range(SLOTS + 3))
    assert [n for n in range(SLOTS + 3) if pages.is_kept(key(n))] == list(range(3, SLOTS + 3))


def test_what_was_spared_expires() -> None:
    pages = Hierarchy(HostSlots(SLOTS), has_disk=True)
    fill(pages, range(SLOTS))
    admission.make_room(pages, 1, None)
    pages.index.last_use[pages.index.find(key(3))] = 100.0
    assert admission.expire(pages, SLOTS, limit=50.0) == SLOTS - 2
    assert [n for n in range(SLOTS) if pages.is_kept(key(n))] == [3]
    assert admission.expire(pages, SLOTS, limit=101.0) == 1
    pages.check_invariants()
