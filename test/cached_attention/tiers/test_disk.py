import logging
import os
import stat
import threading
import time
from concurrent.futures import CancelledError

import pytest

from cached_attention.tiers.disk_directory import DirectoryInUseError
from cached_attention.tiers.page_io import ReadOutcome


def test_pages_come_back_as_they_were_written(store):
    tier = store.open()
    slots = store.write(tier, list(range(40)))
    assert sorted(slots) == list(range(40))
    store.check_serves(tier, slots)
    tier.check_invariants()
    assert tier.close()


def test_pages_survive_reopening_with_all_that_is_known_of_them(store):
    tier = store.open()
    slots = store.write(tier, [0, 1, 2], last_use=time.time() - 5, uses=3)
    tier.close()

    tier = store.open()
    held = store.held(tier)
    assert {key: record.slot for key, record in held.items()} == {store.pages.key(n): s for n, s in slots.items()}
    second = held[store.pages.key(1)]
    assert (second.parent, second.base_position, second.uses) == (store.pages.key(0), 64, 3)
    assert held[store.pages.key(0)].parent is None
    store.check_serves(tier, slots)
    tier.check_invariants()
    tier.close()


def test_removed_slots_are_used_again_and_stay_removed(store):
    tier = store.open()
    slots = store.write(tier, list(range(20)))
    free = tier.free_slots
    tier.remove(slots[n] for n in range(10))
    assert tier.flush(10)
    assert tier.free_slots == free + 10
    again = store.write(tier, list(range(100, 110)))
    assert set(again.values()) == {slots[n] for n in range(10)}
    tier.close()

    tier = store.open()
    assert len(store.held(tier)) == 20
    store.check_serves(tier, again)
    tier.check_invariants()
    tier.close()


def test_a_slot_that_holds_another_page_is_lost_not_served(store):
    tier = store.open()
    slots = store.write(tier, [1, 2])
    outcomes = store.read(tier, {1: slots[2], 2: slots[1]})
    assert set(outcomes.values()) == {ReadOutcome.LOST}
    assert tier.stats.lost == 2
    assert tier.healthy
    tier.close()


def test_writes_beyond_the_capacity_are_declined_from_the_end(store):
    tier = store.open()
    numbers = list(range(tier.capacity_slots + 5))
    slots = store.write(tier, numbers)
    assert list(slots) == numbers[:-5]
    assert tier.stats.declined == 5
    assert tier.free_slots == 0
    tier.check_invariants()
    tier.close()


def test_writes_are_declined_while_too_much_is_queued(store, faulty_io):
    hold = threading.Event()
    faulty_io.before = lambda step: hold.wait(10) if step == "pwritev" else None
    hold.set()
    tier = store.open(io=faulty_io, queued_write_bytes=4 * store.pages.stride)
    hold.clear()
    assert tier.write_room == 4
    first = tier.write([store.pages.to_write(n) for n in range(6)])
    assert tier.write_room == 0
    second = tier.write([store.pages.to_write(7)])
    assert second.result(1) == [None]
    hold.set()
    assert [slot is None for slot in first.result(10)] == [False] * 4 + [True] * 2
    assert tier.write_room == 4
    tier.close()


def test_uses_are_persisted_lazily(store):
    tier = store.open()
    slots = store.write(tier, [1], uses=1)
    tier.touch(slots[1], time.time() - 1, 7)
    tier.close()
    tier = store.open()
    assert store.held(tier)[store.pages.key(1)].uses == 7
    tier.close()


def test_expired_pages_are_dropped_when_the_store_is_opened(store):
    tier = store.open()
    store.write(tier, [1, 2], last_use=time.time() - 100)
    store.write(tier, [3])
    tier.close()
    tier = store.open(ttl=50)
    assert set(store.held(tier)) == {store.pages.key(3)}
    assert tier.stats.dropped == 2
    tier.check_invariants()
    tier.close()


def test_a_smaller_capacity_gives_space_back(store):
    tier = store.open()
    slots = store.write(tier, list(range(tier.capacity_slots)))
    tier.close()
    tier = store.open(capacity=2 << 20)
    held = store.held(tier)
    assert 0 < len(held) == tier.capacity_slots < len(slots)
    store.check_serves(tier, {n: s for n, s in slots.items() if store.pages.key(n) in held})
    tier.check_invariants()
    assert store.usage() <= 2 << 20
    tier.close()
    tier = store.open()
    assert len(store.held(tier)) == len(held)
    tier.check_invariants()
    tier.close()


def test_other_fingerprints_do_not_meet(store):
    tier = store.open("w0")
    slots = store.write(tier, [1, 2])
    tier.close()
    tier = store.open("w1")
    assert not store.held(tier)
    tier.close()
    tier = store.open("w0")
    store.check_serves(tier, slots)
    tier.close()


def test_stores_of_other_fingerprints_count_and_are_reported(store, caplog):
    tier = store.open("w0")
    alone = tier.capacity_slots
    store.write(tier, list(range(alone // 2)))
    tier.close()
    with caplog.at_level(logging.WARNING):
        tier = store.open("w1")
    assert "cached-attention prune" in caplog.text
    assert 0 < tier.capacity_slots < alone
    store.write(tier, list(range(alone)))
    tier.check_invariants()
    assert store.usage() <= store.capacity
    tier.close()


def test_a_store_with_only_expired_pages_is_removed_when_another_opens(store):
    tier = store.open("w0")
    store.write(tier, [1], last_use=time.time() - 100)
    old = tier.path
    tier.close()
    (old / "mine.txt").write_text("kept")
    store.open("w1", ttl=1000).close()
    assert (old / "index.sqlite3").exists()
    store.open("w1", ttl=50).close()
    assert [path.name for path in old.iterdir()] == ["mine.txt"]


@pytest.mark.parametrize("damaged", ["fingerprint.json", "index.sqlite3"])
def test_a_store_that_cannot_be_read_expires_when_nothing_was_written_to_it_for_long(store, damaged):
    """As one that a later version made."""
    tier = store.open("w0")
    store.write(tier, [1])
    old = tier.path
    tier.close()
    (old / damaged).write_bytes(b"of another version")
    store.open("w1", ttl=1000).close()
    assert (old / "index.sqlite3").exists()
    for path in old.iterdir():
        os.utime(path, (time.time() - 2000,) * 2)
    store.open("w1", ttl=1000).close()
    assert not old.exists()


def test_a_directory_has_one_owner(store):
    tier = store.open()
    with pytest.raises(DirectoryInUseError, match=r"process \d+ on .+ \(since"):
        store.open("w1")
    tier.close()
    store.open("w1").close()


def test_only_the_owner_may_read_the_files(store):
    tier = store.open()
    store.write(tier, [1])
    for path in [store.directory, *store.directory.rglob("*")]:
        mode = stat.S_IMODE(path.stat().st_mode)
        assert mode == (0o700 if path.is_dir() else 0o600), path
    tier.close()


def test_a_read_can_be_cancelled_before_it_begins(store, faulty_io):
    tier = store.open(io=faulty_io, io_threads=1)
    slots = store.write(tier, [1, 2])
    hold, begun = threading.Event(), threading.Semaphore(0)
    faulty_io.before = lambda step: (begun.release(), hold.wait(10))
    first, second, third = (tier.read([store.pages.to_read(n, slots[n])]) for n in (1, 2, 1))
    fourth = tier.read([store.pages.to_read(2, slots[2])])
    for _ in range(3):
        assert begun.acquire(timeout=10)
    assert fourth.cancel()
    assert not first.cancel()
    hold.set()
    assert first.result(10) == second.result(10) == third.result(10) == [ReadOutcome.READ]
    with pytest.raises(CancelledError):
        fourth.result(10)


def test_a_slow_read_leaves_threads_to_others(store, faulty_io):
    tier = store.open(io=faulty_io, io_threads=2)
    slots = store.write(tier, list(range(41)))
    bad_spot, hold, read = {slots[n] for n in range(0, 40, 2)}, threading.Event(), faulty_io.preadv

    def preadv(fd, buffers, offset):
        if offset // tier.stride in bad_spot:
            assert hold.wait(20)
        return read(fd, buffers, offset)

    faulty_io.preadv = preadv
    slow = tier.read([store.pages.to_read(n, slots[n]) for n in range(0, 40, 2)])
    quick = tier.read([store.pages.to_read(n, slots[n]) for n in (39, 37, 35)])
    assert quick.result(10) == [ReadOutcome.READ] * 3
    assert not slow.done()
    hold.set()
    assert slow.result(10) == [ReadOutcome.READ] * 20
    assert tier.close()
    assert tier.close()


def test_close_finishes_what_was_asked_for(store):
    tier = store.open()
    write = tier.write([store.pages.to_write(n) for n in range(50)])
    assert tier.close()
    assert None not in write.result(0)
    assert tier.write([store.pages.to_write(1)]).result(0) == [None]
    assert tier.read([store.pages.to_read(1, 0)]).result(0) == [ReadOutcome.UNAVAILABLE]


def test_close_gives_up_on_a_stuck_disk(store, faulty_io):
    tier = store.open(io=faulty_io)
    hold = threading.Event()
    faulty_io.before = lambda step: hold.wait(30)
    write = tier.write([store.pages.to_write(n) for n in range(4)])
    begun = time.monotonic()
    assert not tier.close(timeout=0.2)
    assert time.monotonic() - begun < 5
    assert write.result(0) == [None] * 4
    hold.set()


def test_buffers_of_another_size_are_refused(store):
    tier = store.open()
    page = store.pages.to_write(1)
    with pytest.raises(ValueError, match="slots have 8192"):
        tier.write([page._replace(buffer=page.buffer[:5000])])
    tier.close()


def test_a_capacity_below_one_page_is_refused(store):
    with pytest.raises(ValueError, match=r"give at least"):
        store.open(capacity=100_000)


def test_removing_a_slot_without_a_page_is_refused(store):
    tier = store.open()
    with pytest.raises(ValueError, match="slot 3"):
        tier.remove([3])
    tier.close()
