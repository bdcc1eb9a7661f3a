"""A process that dies at any moment loses pages at most, and never leaves a wrong one."""

import os
import random
import shutil
import signal
import sqlite3
import time
import traceback
from contextlib import closing

import pytest

from cached_attention.tiers.disk_directory import stores
from cached_attention.tiers.disk_reader import StoreReader
from cached_attention.tiers.page_io import ReadOutcome

CRASHES = int(os.environ.get("CACHED_ATTENTION_TEST_CRASHES", "200"))
BATCH = 6


def in_child(run):
    """Fork; `run(report)` in the child. Returns the child's pid and the pipe of its reports."""
    reading, writing = os.pipe()
    pid = os.fork()
    if pid:
        os.close(writing)
        return pid, os.fdopen(reading)
    status = 1
    try:
        os.close(reading)
        run(lambda *words: os.write(writing, (" ".join(map(str, words)) + "\n").encode()))
        status = 0
    except BaseException:
        traceback.print_exc()
        raise
    finally:
        os._exit(status)


def save_without_end(store, first, report):
    """Saves pages and, when the store is full, removes old ones; says what is done, and what begins."""
    tier = store.open(io_threads=3)
    held = {record.base_position // 64: record.slot for record in tier.records()}
    report("open")
    while True:
        if tier.free_slots < BATCH:
            gone = random.Random(first).sample(sorted(held), 4 * BATCH)
            report("removing", *gone)
            tier.remove(held.pop(number) for number in gone)
            tier.flush(10)
        slots = store.write(tier, list(range(first, first + BATCH)))
        held |= slots
        report("saved", *slots)
        tier.touch(next(iter(held.values())), time.time(), 2)
        first += BATCH


def verify(store):
    for path in stores(store.directory):
        with closing(StoreReader(path)) as reader:
            assert reader.index_problem() is None
            assert all(map(reader.is_good, reader.records()))
            assert not reader.damaged_rows


def check(store, expected):
    """Open after a crash: all of `expected` (numbers) is there, and all that is there is right."""
    verify(store)
    tier = store.open()
    held = {record.base_position // 64: record.slot for record in tier.records()}
    assert tier.stats.dropped == 0
    assert expected <= held.keys()
    store.check_serves(tier, held)
    tier.check_invariants()
    assert store.usage() <= store.capacity
    assert tier.close()
    return set(held)


def test_killed_at_random_moments(store):
    chance = random.Random(7)
    expected: set[int] = set()
    for crash in range(CRASHES):
        pid, reports = in_child(lambda report, first=crash * 10**6: save_without_end(store, first, report))
        assert reports.readline() == "open\n"
        time.sleep(chance.uniform(0, 0.03))
        os.kill(pid, signal.SIGKILL)
        assert os.waitpid(pid, 0)[1] == signal.SIGKILL
        for line in reports:
            word, *numbers = line.split()
            if word == "saved":
                expected |= set(map(int, numbers))
            else:
                expected -= set(map(int, numbers))
        expected = check(store, expected)
    assert expected


def demote(store, io, report):
    """One demotion: pages go out, others make room, one was used."""
    tier = store.open(io=io, io_threads=1)
    held = {record.base_position // 64: record.slot for record in tier.records()}
    if held:
        tier.remove([held[1], held[2]])
        tier.touch(held[3], time.time(), 9)
    slots = store.write(tier, [100, 101, 102])
    report("saved", *slots)
    tier.close()


def stopping_io(io, stop_at, torn):
    """`io` that kills the process at its `stop_at`-th step; `torn`: when half of a write is done."""
    steps = iter(range(10**6))
    plain_write = io.pwritev

    def pwritev(fd, buffers, offset):
        if torn and next(steps) == stop_at:
            os.pwritev(fd, [buffers[0][:4096]], offset)
            os.kill(os.getpid(), signal.SIGKILL)
        return plain_write(fd, buffers, offset)

    def before(step):
        if not torn and next(steps) == stop_at:
            os.kill(os.getpid(), signal.SIGKILL)

    io.before, io.pwritev = before, pwritev
    return io


@pytest.mark.parametrize("torn", [False, True])
@pytest.mark.parametrize("before", [[], list(range(10))], ids=["empty", "filled"])
def test_stopped_at_every_step_of_a_demotion(store, faulty_io, fast_path, before, torn):
    tier = store.open()
    store.write(tier, before)
    tier.close()
    template, kept = store.directory, set(before) - {1, 2}
    stops = 0
    for stop_at in range(1000):
        store.directory = fast_path / f"stop-{stop_at}"
        shutil.copytree(template, store.directory)
        io = stopping_io(type(faulty_io)(), stop_at, torn)
        pid, reports = in_child(lambda report, io=io: demote(store, io, report))
        status = os.waitpid(pid, 0)[1]
        saved = {int(number) for line in reports for number in line.split()[1:]}
        held = check(store, saved | kept)
        assert held <= {*before, 100, 101, 102}
        if status == 0:
            assert held == kept | {100, 101, 102}
            break
        assert status == signal.SIGKILL
        stops += 1
        shutil.rmtree(store.directory)
    assert stops >= (2 if torn else 7)


def test_bytes_are_durable_before_their_row_and_rows_before_the_report(store, faulty_io):
    """What a power cut needs and a killed process does not show."""
    steps, future = [], None
    tier = store.open(io=faulty_io)
    faulty_io.before = lambda step: steps.append((step, future is not None and future.done()))
    future = tier.write([store.pages.to_write(number) for number in range(3)])
    assert None not in future.result(10)
    assert [step for step, _ in steps if step != "allocate"][-3:] == ["pwritev", "fdatasync", "commit"]
    assert not any(done for _, done in steps)
    (level,) = tier._store.index._connection.execute("PRAGMA synchronous").fetchone()
    assert level == 2, "the log must be synced at every commit"
    tier.close()


def test_log_cut_after_every_write_of_a_commit(store, fast_path):
    """SQLite writes its log as one header and one write per frame: the log ends after any of them, or within."""
    tier = store.open()
    store.write(tier, list(range(5)))
    tier.close()

    def work(report):
        tier = store.open()
        held = [record.slot for record in tier.records()]
        store.write(tier, [100, 101])
        store.write(tier, [102])
        tier.remove(held[:2])
        tier.flush(10)
        os.kill(os.getpid(), signal.SIGKILL)

    os.waitpid(in_child(work)[0], 0)
    (log,) = store.directory.rglob("index.sqlite3-wal")
    size = log.stat().st_size
    frames = range(32, size + 1, 4096 + 24)
    cuts = sorted({0, 16, 32, size} | {min(size, frame + part) for frame in frames for part in (0, 24, 2000)})
    assert len(cuts) > 10
    template, found = store.directory, []
    for cut in cuts:
        store.directory = fast_path / f"cut-{cut}"
        shutil.copytree(template, store.directory)
        os.truncate(next(store.directory.rglob("index.sqlite3-wal")), cut)
        found.append(frozenset(check(store, {2, 3, 4})))
    before = frozenset(range(5))
    commits = [before, before | {100, 101}, before | {100, 101, 102}, frozenset({2, 3, 4, 100, 101, 102})]
    assert [held for held in commits if held in found] == commits
    assert found == sorted(found, key=commits.index), "a state that no commit made"


def test_half_made_stores_open(store):
    """What a crash between the first steps of a store's life leaves."""
    directory = store.open().path
    for leftover in ("fingerprint.json.new", "probe.bin", "index.sqlite3-journal"):
        (directory / leftover).write_bytes(b"half")
    store.directory = store.directory.with_name("other")
    path = store.directory / directory.name
    path.mkdir(parents=True)
    (path / "index.sqlite3").touch()
    (path / "pages-000000.bin").write_bytes(bytes(10**6))
    tier = store.open()
    slots = store.write(tier, [1, 2, 3])
    tier.close()
    tier = store.open()
    assert set(store.read(tier, slots).values()) == {ReadOutcome.READ}
    tier.check_invariants()
    tier.close()


def test_an_index_left_by_a_crash_of_sqlite_is_recovered(store):
    """The log alone holds the rows: nothing was checkpointed."""

    def work(report):
        tier = store.open()
        report(*store.write(tier, list(range(30))))
        os.kill(os.getpid(), signal.SIGKILL)

    pid, reports = in_child(work)
    os.waitpid(pid, 0)
    saved = {int(number) for line in reports for number in line.split()}
    index = next(store.directory.rglob("index.sqlite3"))
    with sqlite3.connect(f"file:{index}?immutable=1", uri=True) as without_log:
        assert without_log.execute("SELECT count(*) FROM pages").fetchone() == (0,)
    assert check(store, saved) == set(range(30))
