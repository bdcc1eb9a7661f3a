"""A disk that is full, slow, gone or broken: misses and declined writes, never an exception."""

import errno
import os
import shutil
import sqlite3
import subprocess
import threading
import time
from types import SimpleNamespace

import pytest

from cached_attention.tiers import disk_growth, disk_space, io_queue
from cached_attention.tiers.disk_index import DiskIndex
from cached_attention.tiers.page_io import ReadOutcome


def wait_for(condition, seconds=10):
    end = time.monotonic() + seconds
    while not condition() and time.monotonic() < end:
        time.sleep(0.01)
    assert condition()


@pytest.fixture
def small_disk(fast_path):
    """A file system of 1 MiB; where none can be mounted, the name of a directory for injected faults."""
    path = fast_path / "small"
    path.mkdir()
    mounted = (
        shutil.which("mount")
        and not subprocess.run(
            ["mount", "-t", "tmpfs", "-o", "size=1m", "none", str(path)], capture_output=True
        ).returncode
    )
    yield path, bool(mounted)
    if mounted:
        subprocess.run(["umount", "--lazy", str(path)], check=True)


def full_after(io, count):
    """`io` on a file system that has room for `count` bytes of slots."""
    plain, left = io.allocate, [count]

    def allocate(fd, offset, length):
        if length > left[0]:
            raise OSError(errno.ENOSPC, "No space left on device")
        left[0] -= length
        plain(fd, offset, length)

    io.allocate = allocate
    return io


def test_a_full_file_system_declines_writes_and_serves_reads(
    store_in, small_disk, faulty_io, monkeypatch, caplog
):
    path, mounted = small_disk
    monkeypatch.setattr("cached_attention.tiers.disk_files.GROWTH_BYTES", 64 << 10)
    monkeypatch.setattr(disk_growth, "PAUSE", 0.05)
    store = store_in(path / "kv", capacity=16 << 20)
    tier = store.open(io=faulty_io if mounted else full_after(faulty_io, 512 << 10))
    slots = {}
    for first in range(0, 400, 10):
        slots |= store.write(tier, list(range(first, first + 10)))
    assert 10 < len(slots) < 200
    assert tier.stats.failed > 0
    store.check_serves(tier, slots)
    assert "declined until others leave" in caplog.text
    tier.remove([slots.pop(number) for number in list(slots)[:20]])
    tier.flush(5)
    wait_for(lambda: tier.healthy)
    again = store.write(tier, list(range(1000, 1010)))
    store.check_serves(tier, slots | again)
    tier.close()
    tier = store.open()
    store.check_serves(tier, slots | again)
    tier.close()


def test_growth_is_tried_again_after_a_pause(store, faulty_io, monkeypatch):
    monkeypatch.setattr(disk_growth, "PAUSE", 0.05)
    tier = store.open(io=faulty_io)

    def full(step):
        if step == "allocate":
            raise OSError(errno.ENOSPC, "No space left on device")

    faulty_io.before = full
    assert not store.write(tier, [1, 2])
    assert tier.free_slots == 0
    assert tier.healthy
    faulty_io.before = lambda step: None
    wait_for(lambda: tier.free_slots)
    store.check_serves(tier, store.write(tier, [1, 2]))
    tier.check_invariants()
    tier.close()


@pytest.mark.parametrize("step", ["pwritev", "fdatasync", "commit", "preadv"])
def test_out_of_service_after_repeated_errors_and_back(store, faulty_io, step, caplog):
    tier = store.open(io=faulty_io)
    slots = store.write(tier, list(range(10)))
    fault = OSError(errno.EIO, "Input/output error")
    if step == "commit":
        fault = sqlite3.OperationalError("disk I/O error")

    def fail(now):
        if now == step:
            raise fault

    faulty_io.before = fail
    for number in range(100, 200):
        if not tier.healthy:
            break
        assert not store.write(tier, [number]) or step == "preadv"
        store.read(tier, slots)
    assert not tier.healthy
    begun = time.monotonic()
    served = {ReadOutcome.UNAVAILABLE} if step == "preadv" else {ReadOutcome.READ}
    assert set(store.read(tier, slots).values()) == served, "what does not work alone is out of service"
    assert not store.write(tier, [200])
    assert time.monotonic() - begun < 0.5
    assert sum("error" in record.message.lower() for record in caplog.records) <= 2

    faulty_io.before = lambda now: None
    wait_for(lambda: tier.healthy)
    store.check_serves(tier, slots | store.write(tier, [201]))
    tier.check_invariants()
    tier.close()


@pytest.mark.parametrize("step", ["fdatasync", "commit", "saved"])
def test_an_unexpected_error_does_not_end_the_thread_that_commits(store, faulty_io, monkeypatch, step, caplog):
    tier = store.open(io=faulty_io)
    slots = store.write(tier, [0])

    def fail(now):
        if now == step:
            raise MemoryError

    faulty_io.before = fail
    outcome = tier._committer._outcome
    if step == "saved":
        monkeypatch.setattr(outcome, "saved", lambda records: fail("saved"))
        tier.write([store.pages.to_write(1)])
        wait_for(lambda: "unexpected" in caplog.text)
    else:
        assert not store.write(tier, [1])
    assert "in an unexpected way" in caplog.text
    monkeypatch.undo()
    faulty_io.before = lambda now: None
    store.check_serves(tier, slots | store.write(tier, [2, 3]))
    tier.close()


def test_removals_wait_for_the_index_to_work_again(store, faulty_io):
    tier = store.open(io=faulty_io)
    slots = store.write(tier, list(range(4)))
    free = tier.free_slots

    def fail(step):
        if step == "commit":
            raise sqlite3.OperationalError("database or disk is full")

    faulty_io.before = fail
    tier.remove(slots.values())
    assert not tier.flush(2)
    assert tier.free_slots == free, "a slot may be used again only after its row is gone"
    faulty_io.before = lambda step: None
    wait_for(lambda: tier.free_slots == free + 4)
    tier.close()
    tier = store.open()
    assert not store.held(tier)
    tier.close()


def test_directory_removed_under_a_running_tier(store):
    tier = store.open()
    slots = store.write(tier, list(range(10)))
    shutil.rmtree(store.directory)
    for first in range(100, 160, 2):
        assert not store.write(tier, [first, first + 1]), "reported as saved, in a file without a name"
        assert set(store.read(tier, slots).values()) <= {ReadOutcome.READ, ReadOutcome.UNAVAILABLE}
    assert not tier.healthy
    tier.close()
    tier = store.open()
    assert not store.held(tier)
    store.check_serves(tier, store.write(tier, [1]))
    tier.close()


def test_a_directory_that_takes_no_files_is_refused(store):
    store.directory.parent.mkdir(exist_ok=True)
    store.directory.write_text("a file, where a directory should be")
    with pytest.raises(OSError, match="kv"):
        store.open()


def test_a_directory_that_became_read_only(store, faulty_io):
    tier = store.open(io=faulty_io)
    slots = store.write(tier, list(range(5)))
    writes = {"pwritev", "allocate", "fdatasync", "commit"}

    def read_only(step):
        if step in writes:
            raise OSError(errno.EROFS, "Read-only file system")

    faulty_io.before = read_only
    assert not store.write(tier, [10])
    store.check_serves(tier, slots)
    tier.close()


def test_a_slow_disk_does_not_hold_the_caller(store, faulty_io):
    tier = store.open(io=faulty_io)
    slots = store.write(tier, list(range(8)))
    faulty_io.before = lambda step: time.sleep(0.2) if step != "commit" else None
    begun = time.monotonic()
    reads = tier.read([store.pages.to_read(number, slot) for number, slot in slots.items()])
    write = tier.write([store.pages.to_write(100)])
    tier.touch(slots[1], time.time(), 5)
    tier.remove([slots[0]])
    assert time.monotonic() - begun < 0.1
    assert not reads.done()
    assert not write.done()
    reads.result(10)
    assert write.result(10) != [None]
    tier.close()


def test_reads_go_before_writes(store, faulty_io, monkeypatch):
    monkeypatch.setattr(io_queue, "WRITE_PATIENCE", 60)
    tier = store.open(io=faulty_io, io_threads=1)
    slots = store.write(tier, [1])
    order, hold = [], threading.Event()

    def note(step):
        hold.wait(10)
        if step in ("preadv", "pwritev"):
            order.append(step)

    faulty_io.before = note
    first = tier.read([store.pages.to_read(1, slots[1])])
    writes = [tier.write([store.pages.to_write(100 + n)]) for n in range(3)]
    reads = [tier.read([store.pages.to_read(1, slots[1])]) for _ in range(5)]
    hold.set()
    for future in [first, *reads, *writes]:
        future.result(10)
    assert order == ["preadv"] * 6 + ["pwritev"] * 3
    tier.close()


def test_writes_are_not_starved_by_reads_without_end(store, faulty_io):
    tier = store.open(io=faulty_io, io_threads=2)
    slots = store.write(tier, [1])
    faulty_io.before = lambda step: time.sleep(0.002) if step == "preadv" else None
    write = tier.write([store.pages.to_write(100)])
    end = time.monotonic() + 10
    while not write.done() and time.monotonic() < end:
        reads = [tier.read([store.pages.to_read(1, slots[1])]) for _ in range(20)]
        reads[5].result(10)
    assert write.done()
    tier.close()


def test_without_direct_io_the_page_cache_is_used_and_said_once(store, faulty_io, caplog):
    plain = faulty_io.open

    def no_direct(path, flags):
        if flags & os.O_DIRECT:
            raise OSError(errno.EINVAL, "Invalid argument")
        return plain(path, flags)

    faulty_io.open = no_direct
    tier = store.open(io=faulty_io)
    assert not tier.direct
    store.check_serves(tier, store.write(tier, list(range(30))))
    tier.check_invariants()
    assert caplog.text.count("O_DIRECT") == 1
    tier.close()


def test_short_transfers_are_continued(store, faulty_io):
    read, write = faulty_io.preadv, faulty_io.pwritev
    faulty_io.preadv = lambda fd, buffers, offset: read(fd, [buffers[0][:4096]], offset)
    faulty_io.pwritev = lambda fd, buffers, offset: write(fd, [buffers[0][:4096]], offset)
    tier = store.open(io=faulty_io)
    slots = store.write(tier, list(range(12)))
    assert len(slots) == 12
    store.check_serves(tier, slots)
    tier.close()


def test_a_read_only_file_system_is_refused(store_in, small_disk):
    path, mounted = small_disk
    if not mounted:
        pytest.skip("file systems cannot be mounted here")
    subprocess.run(["mount", "-o", "remount,ro", str(path)], check=True)
    with pytest.raises(OSError, match="Read-only file system"):
        store_in(path / "kv").open()


def test_a_slot_file_removed_under_a_running_tier_is_made_again(store):
    tier = store.open()
    slots = store.write(tier, list(range(10)))
    (tier.path / "pages-000000.bin").unlink()
    assert not store.write(tier, [100]), "reported as saved, in a file without a name"
    wait_for(lambda: tier.healthy)
    assert set(store.read(tier, slots).values()) == {ReadOutcome.LOST}
    tier.remove(slots.values())
    store.check_serves(tier, store.write(tier, list(range(200, 230))))
    tier.check_invariants()
    tier.close()


def test_slots_of_a_lost_file_do_not_stop_writes_where_there_is_no_room(store, faulty_io, monkeypatch):
    monkeypatch.setattr(disk_space, "FILE_BYTES", 80 * 8192)
    monkeypatch.setattr(disk_growth, "PAUSE", 0.2)
    store.capacity = 8 << 20
    tier = store.open()
    per_file = tier._files.slots_per_file
    store.write(tier, list(range(per_file + 40)))
    tier.close()
    (tier.path / "pages-000000.bin").unlink()

    def full(step):
        if step == "allocate":
            raise OSError(errno.ENOSPC, "No space left on device")

    faulty_io.before = full
    tier = store.open(io=faulty_io)
    assert len(store.held(tier)) == 40
    assert tier._slots.recycled == tier._files.slots_held(1) - 40
    tier.remove([record.slot for record in tier.records()][:20])
    assert tier.flush(10)
    room = tier._slots.recycled
    assert room >= 20
    saved = [
        slot for first in range(1000, 1000 + 2 * room, 5) for slot in store.write(tier, range(first, first + 5))
    ]
    assert len(saved) >= room - 5
    faulty_io.before = lambda step: None
    time.sleep(0.3)
    assert len(store.write(tier, list(range(5000, 5010)))) == 10, "it grows again"
    tier.check_invariants()
    tier.close()


def test_a_file_system_that_is_full_at_start_says_so(store, monkeypatch):
    store.open().close()

    def fail(*_):
        raise sqlite3.OperationalError("disk I/O error")

    monkeypatch.setattr(DiskIndex, "set_meta", fail)
    with pytest.raises(sqlite3.OperationalError):
        store.open()
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=0))
    with pytest.raises(OSError, match="the file system is full") as error:
        store.open()
    assert error.value.errno == errno.ENOSPC
    monkeypatch.undo()
    tier = store.open()
    store.check_serves(tier, store.write(tier, [1]))
    tier.close()
