"""When a load may start while the forward before its own runs. The schedule fuzzer tests that it may."""

from __future__ import annotations

import pytest

from cached_attention.transfer.cpu_stream import CpuEvent
from cached_attention.transfer.load_fence import LoadFence


class Slots:
    """Counts how often slots became free."""

    def __init__(self) -> None:
        self.frees = 0
        self.fence = LoadFence(lambda: self.frees)
        self.first, self.second = CpuEvent(), CpuEvent()
        self.old = object()
        self.fence.locked(self.old)
        self.fence.launched([self.first])
        self.fence.launched([self.second])

    def free(self) -> None:
        self.frees += 1


@pytest.fixture
def slots() -> Slots:
    return Slots()


def test_until_somebody_lets_go_only_the_forwards_before_the_last_matter(slots: Slots) -> None:
    assert not slots.fence.is_closed
    assert slots.fence.earlier == [slots.first]


def test_a_lock_closes_it_if_the_last_forward_may_have_needed_it(slots: Slots) -> None:
    young = object()
    slots.fence.locked(young)
    slots.fence.unlocked(young)
    assert not slots.fence.is_closed
    slots.fence.unlocked(slots.old)
    assert slots.fence.is_closed
    slots.fence.launched([CpuEvent()])
    assert not slots.fence.is_closed
    assert slots.fence.earlier == [slots.second]


def test_it_can_be_closed_until_the_next_launch(slots: Slots) -> None:
    slots.fence.close()
    assert slots.fence.is_closed
    slots.fence.launched([CpuEvent()])
    assert not slots.fence.is_closed


def test_a_lock_grows_old_with_the_next_launch(slots: Slots) -> None:
    lock = object()
    slots.fence.locked(lock)
    slots.fence.launched([CpuEvent()])
    slots.fence.unlocked(lock)
    assert slots.fence.is_closed


def test_what_becomes_free_closes_it_unless_it_was_evicted(slots: Slots) -> None:
    with slots.fence.evicting():
        with slots.fence.evicting():
            slots.free()
        slots.free()
    assert not slots.fence.is_closed
    slots.free()
    assert slots.fence.is_closed
    with slots.fence.evicting():
        slots.free()
    assert slots.fence.is_closed


def test_before_two_launches_nothing_is_known() -> None:
    fence = LoadFence(int)
    assert fence.is_closed
    fence.launched([CpuEvent()])
    assert fence.is_closed
    fence.launched([CpuEvent()])
    assert not fence.is_closed


def test_without_streams_there_is_nothing_to_wait_for() -> None:
    fence = LoadFence(int)
    fence.launched([])
    assert not fence.is_closed
    assert fence.earlier == ()
