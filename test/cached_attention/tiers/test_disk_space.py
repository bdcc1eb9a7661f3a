"""The directory's blocks on the file system stay within the limit, whatever happens in it."""

import random
import time

import pytest

from cached_attention.tiers import disk_growth
from cached_attention.tiers.disk_directory import DirectoryInUseError, stores
from cached_attention.tiers.disk_index import open_read_only
from cached_attention.tiers.disk_space import Space, disk_usage, slot_stride


def wait_until_healthy(tier):
    end = time.monotonic() + 10
    while not tier.healthy and time.monotonic() < end:
        time.sleep(0.01)
    assert tier.healthy


@pytest.fixture(params=["disk", "memory"])
def place(request, tmp_path, fast_path):
    return (tmp_path if request.param == "disk" else fast_path) / "kv"


@pytest.mark.parametrize(("page_bytes", "capacity"), [(4096, 4 << 20), (5000, 3 << 20), (300_000, 20 << 20)])
def test_usage_stays_within_the_limit(store_in, place, page_bytes, capacity):
    store = store_in(place, page_bytes, capacity)
    tier = store.open()
    assert tier.capacity_slots * tier.stride > 0.6 * capacity, "the reserve takes too much"
    chance, held, most = random.Random(1), {}, 0
    reader = open_read_only(tier.path / "index.sqlite3")
    for step in range(20):
        if step % 10 == 3:
            reader.execute("BEGIN")
            reader.execute("SELECT count(*) FROM pages").fetchone()
        if step % 10 == 7:
            reader.execute("COMMIT")
        numbers = [step * 1000 + n for n in range(max(1, tier.capacity_slots // 3))]
        held |= store.write(tier, numbers)
        most = max(most, store.usage())
        gone = chance.sample(sorted(held), len(held) // 3)
        tier.remove(held.pop(number) for number in gone)
        for slot in held.values():
            tier.touch(slot, 1.0 + step, step)
        tier.flush(0.1)
        most = max(most, store.usage())
    reader.close()
    wait_until_healthy(tier)
    assert most <= capacity
    assert disk_usage(store.directory) == store.usage()
    store.check_serves(tier, held)
    tier.check_invariants()
    tier.close()
    assert store.usage() <= capacity


def test_a_log_that_a_reader_holds_is_bounded(store):
    tier = store.open()
    reader = open_read_only(tier.path / "index.sqlite3")
    reader.execute("BEGIN")
    reader.execute("SELECT count(*) FROM pages").fetchone()
    slots, log = {}, tier.path / "index.sqlite3-wal"
    for number in range(300):
        slots |= store.write(tier, [number])
        for slot in slots.values():
            tier.touch(slot, float(number), 1)
        tier.flush(0.2)
        assert log.stat().st_size <= Space.within(store.capacity, tier.stride).log_bytes
        if not tier.healthy:
            break
    assert not tier.healthy, "the log never came to its limit: this test shows nothing"
    reader.close()
    wait_until_healthy(tier)
    assert store.write(tier, [1000])
    tier.close()


def test_files_of_others_count_and_survive(store, monkeypatch):
    store.directory.mkdir()
    theirs = store.directory / "theirs.bin"
    theirs.write_bytes(b"t" * (1 << 20))
    monkeypatch.setattr("cached_attention.tiers.disk_files.GROWTH_BYTES", 64 << 10)
    monkeypatch.setattr(disk_growth, "PAUSE", 0.0)
    tier = store.open()
    foreign = tier.path / "notes.txt"
    foreign.write_text("not a slot file")
    odd = tier.path / "pages-1.bin"
    odd.write_text("almost a slot file")
    store.write(tier, list(range(100)))
    (store.directory / "more.bin").write_bytes(b"m" * (1 << 20))
    slots = store.write(tier, list(range(100, 1000)))
    assert len(slots) < tier.capacity_slots - 100
    assert store.usage() <= store.capacity
    tier.close()
    store.open("w1", ttl=0.0, capacity=3 << 20).close()
    assert theirs.stat().st_size == 1 << 20
    assert foreign.exists()
    assert odd.exists()


def test_a_directory_full_of_other_files_serves_nothing_and_says_so(store, caplog):
    store.directory.mkdir()
    (store.directory / "theirs.bin").write_bytes(b"t" * store.capacity)
    tier = store.open()
    assert "other files take" in caplog.text
    assert tier.capacity_slots == tier.free_slots == 0
    assert not store.write(tier, [1])
    assert tier.healthy
    tier.close()


@pytest.mark.parametrize("budget", [1 << 20, 1 << 30, 1 << 40, 10 << 40])
@pytest.mark.parametrize("page_bytes", [4096, 48 << 10, 1 << 20, 32 << 20])
def test_a_plan_uses_its_budget_and_no_more(budget, page_bytes):
    stride = slot_stride(page_bytes)
    space = Space.within(budget, stride)
    assert space.slots * stride + space.reserve <= budget
    if budget > 1 << 30:
        assert space.slots * stride > 0.85 * budget
        assert space.slots / space.slots_per_file < 66


def test_no_budget_gives_no_slots():
    assert Space.within(-5, 4096).slots == 0
    assert Space.within(0, 4096).slots == 0


def test_a_store_of_before_gives_its_space_back_when_its_pages_have_expired(store, monkeypatch):
    monkeypatch.setattr(disk_growth, "PAUSE", 0.1)
    tier = store.open("old")
    count = tier.capacity_slots
    assert len(store.write(tier, list(range(count - 20)))) == count - 20
    tier.close()
    tier = store.open("new", ttl=1.5)
    assert len(store.write(tier, list(range(1000, 1000 + count)))) < 30, "more than there was room for"
    assert disk_usage(store.directory) <= store.capacity
    end, saved, number = time.monotonic() + 30, 0, 2000
    while saved < count // 2:
        assert time.monotonic() < end, "the space of before is not used"
        saved += len(store.write(tier, list(range(number, number + 20))))
        number += 20
    assert [path.name for path in stores(store.directory)] == [tier.path.name]
    assert disk_usage(store.directory) <= store.capacity
    tier.check_invariants()
    tier.close()


def test_a_store_with_others_beside_it_keeps_the_pages_that_there_is_room_for(store):
    tier = store.open("old")
    count = tier.capacity_slots
    store.write(tier, list(range(count // 2)))
    tier.close()
    tier = store.open("new")
    slots = store.write(tier, list(range(1000, 1000 + count // 4)))
    assert len(slots) == count // 4
    tier.close()
    (store.directory / "photo.jpg").write_bytes(bytes(store.capacity * 3 // 8))
    tier = store.open("new")
    assert 0 < len(store.held(tier)) < count // 4
    assert disk_usage(store.directory) <= store.capacity
    tier.check_invariants()
    tier.close()


def test_what_servers_with_another_number_of_ranks_left_expires(store_in, tmp_path):
    whole = tmp_path / "kv"
    alone, ranks = store_in(whole), [store_in(whole / f"dp0-pp0-tp{rank}") for rank in range(2)]
    old = time.time() - 100
    tier = alone.open()
    alone.write(tier, [1], last_use=old)
    tier.close()
    with_two = [rank.open(whole=whole, ttl=50.0) for rank in ranks]
    assert not stores(whole)
    for rank, tier in zip(ranks, with_two, strict=True):
        rank.write(tier, [1], last_use=old)
    with_two[0].close()
    with_two[1].close()
    tier = alone.open(ttl=50.0)
    assert not any(stores(rank.directory) for rank in ranks)
    tier.close()


def test_a_directory_has_one_server_whatever_its_number_of_ranks(store_in, tmp_path):
    whole = tmp_path / "kv"
    alone, ranks = store_in(whole), [store_in(whole / f"dp0-pp0-tp{rank}") for rank in range(2)]
    tier = alone.open()
    with pytest.raises(DirectoryInUseError, match=f"{whole} is in use"):
        ranks[0].open(whole=whole)
    tier.close()
    with_two = [rank.open(whole=whole) for rank in ranks]
    with pytest.raises(DirectoryInUseError, match=f"{whole} is in use"):
        alone.open()
    with_two[0].close()
    with pytest.raises(DirectoryInUseError):
        alone.open()
    with_two[1].close()
    alone.open().close()
