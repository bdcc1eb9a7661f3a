"""What an encrypted store shows, and what it does with another key or changed bytes."""

import logging
import os
import sqlite3
import stat
from contextlib import closing
from itertools import pairwise

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from cached_attention.encryption import EncryptionKey
from cached_attention.tiers import cipher
from cached_attention.tiers.disk_directory import read_fingerprint
from cached_attention.tiers.disk_pruning import prune
from cached_attention.tiers.disk_reader import StoreReader
from cached_attention.tiers.disk_rows import KeyNeededError
from cached_attention.tiers.page_io import ReadOutcome

KEY, OTHER = EncryptionKey(bytes(range(32))), EncryptionKey(bytes(range(1, 33)))
PAGE_BYTES, STRIDE, PAGES = 8192, 12288, 20
RECORD_BYTES = PAGE_BYTES + 44


@pytest.fixture
def store(store_in, fast_path):
    return store_in(fast_path / "kv", PAGE_BYTES, encryption=KEY)


@pytest.fixture
def slots(store):
    tier = store.open()
    slots = store.write(tier, list(range(PAGES)))
    assert tier.stride == STRIDE
    assert tier.close()
    return slots


def files(store):
    return [path for path in store.directory.rglob("*") if path.is_file()]


def slot_file(store):
    (path,) = store.directory.rglob("pages-*.bin")
    return path


def edit(path, place, data):
    with open(path, "r+b") as file:
        file.seek(place)
        file.write(data)


def sql(store, *statement):
    with closing(sqlite3.connect(next(store.directory.rglob("index.sqlite3")))) as index:
        rows = index.execute(*statement).fetchall()
        index.commit()
    return rows


def test_pages_survive_a_restart_and_nothing_of_them_is_in_the_clear(store, slots):
    everything = b"".join(path.read_bytes() for path in files(store))
    for number in slots:
        record, read = store.pages.record(number), store.pages.to_read(number, 0)
        secrets = [record[at : at + 16] for at in range(0, PAGE_BYTES, 1024)]
        secrets += [read.key[:8], read.checksum.to_bytes(8, "big"), read.checksum.to_bytes(8, "little")]
        assert not any(secret in everything for secret in secrets)
    tier = store.open()
    held = store.held(tier)
    assert {number: held[store.pages.key(number)].slot for number in slots} == slots
    assert held[store.pages.key(15)].parent == store.pages.key(14)
    assert held[store.pages.key(10)].parent is None
    store.check_serves(tier, slots)
    tier.check_invariants()
    tier.close()


def test_a_plain_store_shows_all_of_it(store, slots):
    """The test above looks in the right places."""
    tier = store.open(encryption=None)
    store.write(tier, [3])
    tier.close()
    everything = b"".join(path.read_bytes() for path in files(store))
    assert store.pages.record(3)[:16] in everything
    assert store.pages.key(3)[:8] in everything
    assert store.pages.to_read(3, 0).checksum.to_bytes(8, "big") in everything


def test_equal_pages_look_different_each_time(store, slots):
    first = slot_file(store).read_bytes()
    rows = sql(store, "SELECT epoch, nonce, sealed FROM pages")
    tier = store.open()
    tier.remove(slots.values())
    assert tier.flush(30)
    assert store.write(tier, list(slots)) == slots
    tier.close()
    again = sql(store, "SELECT epoch, nonce, sealed FROM pages")
    assert len({nonce for _, nonce, _ in rows + again}) == 2 * PAGES
    assert len({epoch for epoch, _, _ in rows + again}) == 2, "each opening has a key of its own"
    second = slot_file(store).read_bytes()
    trailers = {file[slot * STRIDE + PAGE_BYTES :][:44] for file in (first, second) for slot in slots.values()}
    assert len(trailers) == 2 * PAGES
    assert not any(first[at : at + 16] == second[at : at + 16] for at in range(0, PAGES * STRIDE, STRIDE))


def test_keys_are_changed_before_nonces_could_meet(store, monkeypatch):
    monkeypatch.setattr(cipher, "EPOCH_RECORDS", 3)
    tier = store.open()
    slots = store.write(tier, list(range(PAGES)))
    store.check_serves(tier, slots)
    tier.close()
    assert len(sql(store, "SELECT DISTINCT epoch FROM pages")) >= PAGES // 4
    tier = store.open()
    assert len(store.held(tier)) == PAGES
    store.check_serves(tier, slots)
    tier.close()


def test_another_key_has_another_store_and_touches_nothing(store, slots, caplog):
    before = {path: path.read_bytes() for path in files(store) if "lock" not in path.name}
    for other in (OTHER, None):
        tier = store.open(encryption=other)
        assert not store.held(tier)
        assert set(store.read(tier, slots).values()) == {ReadOutcome.LOST}
        tier.close()
    assert {path: path.read_bytes() for path in before} == before
    tier = store.open()
    assert "1 stores from before encryption" in caplog.text
    store.check_serves(tier, slots)
    tier.close()


def test_a_store_put_in_place_of_one_with_another_key_is_a_miss(store, slots, caplog):
    tier = store.open(encryption=OTHER)
    theirs = store.write(tier, list(range(PAGES)))
    path = tier.path
    tier.close()
    for name in ("pages-000000.bin",):
        (path / name).write_bytes(slot_file_of(store, KEY).read_bytes())
    tier = store.open(encryption=OTHER)
    assert set(store.read(tier, theirs).values()) == {ReadOutcome.LOST}
    assert tier.stats.lost == PAGES
    tier.close()


def slot_file_of(store, key):
    (path,) = [path for path in store.directory.rglob("pages-*.bin") if is_of(path.parent, key)]
    return path


def is_of(path, key):
    fingerprint = read_fingerprint(path)
    return fingerprint is not None and fingerprint.encryption == key.id


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(number=st.integers(0, PAGES - 1), place=st.integers(0, RECORD_BYTES - 1), bit=st.integers(0, 7))
def test_a_flipped_bit_anywhere_in_a_record_is_that_page_missed(store, slots, number, place, bit):
    path, at = slot_file(store), slots[number] * STRIDE + place
    good = path.read_bytes()[at]
    edit(path, at, bytes([good ^ 1 << bit]))
    tier = store.open()
    outcomes = store.read(tier, slots)
    assert [one for one, outcome in outcomes.items() if outcome is not ReadOutcome.READ] == [number]
    assert tier.stats.lost == 1
    assert tier.healthy
    tier.close()
    edit(path, at, bytes([good]))


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    number=st.integers(0, PAGES - 1),
    column=st.sampled_from([("epoch", 16), ("nonce", 12), ("sealed", 97)]),
    place=st.integers(0, 96),
    bit=st.integers(0, 7),
)
def test_a_flipped_bit_anywhere_in_a_row_is_that_page_dropped(store, slots, number, column, place, bit):
    (name, length), at = column, slots[number]
    ((good,),) = sql(store, f"SELECT {name} FROM pages WHERE slot = ?", (at,))
    bad = bytearray(good)
    bad[place % length] ^= 1 << bit
    sql(store, f"UPDATE pages SET {name} = ? WHERE slot = ?", (bytes(bad), at))
    path = next(path for path in store.directory.iterdir() if path.is_dir())
    with closing(StoreReader(path, KEY)) as reader:
        assert {record.base_position // 64 for record in reader.records()} == set(slots) - {number}
        assert reader.damaged_rows == [at]
    sql(store, f"UPDATE pages SET {name} = ? WHERE slot = ?", (good, at))


def test_swapped_records_and_swapped_rows_are_misses(store, slots):
    path = slot_file(store)
    data = path.read_bytes()
    one, two = (data[slot * STRIDE : (slot + 1) * STRIDE] for slot in (slots[4], slots[9]))
    edit(path, slots[4] * STRIDE, two)
    edit(path, slots[9] * STRIDE, one)
    for source, target in ((slots[11], 900), (slots[12], slots[11]), (900, slots[12])):
        sql(store, "UPDATE pages SET slot = ? WHERE slot = ?", (target, source))
    tier = store.open()
    held = store.held(tier)
    found = {number: held[store.pages.key(number)].slot for number in slots}
    assert (found[11], found[12]) == (slots[12], slots[11])
    outcomes = store.read(tier, found)
    assert {number for number, outcome in outcomes.items() if outcome is ReadOutcome.LOST} == {4, 9, 11, 12}
    assert tier.stats.lost == 4
    tier.close()


def test_a_truncated_file_is_misses(store, slots):
    os.truncate(slot_file(store), 7 * STRIDE + PAGE_BYTES)
    tier = store.open()
    kept = {number: slot for number, slot in slots.items() if slot < 7}
    assert {record.slot for record in store.held(tier).values()} == set(kept.values())
    store.check_serves(tier, kept)
    tier.check_invariants()
    tier.close()


OPERATIONS = st.lists(
    st.one_of(
        st.tuples(st.just("write"), st.integers(0, 30)),
        st.tuples(st.just("remove"), st.integers(0, 30)),
        st.tuples(st.just("damage"), st.integers(0, 31 * STRIDE)),
        st.tuples(st.just("reopen"), st.just(0)),
    ),
    max_size=30,
)


@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(operations=OPERATIONS)
def test_it_answers_as_a_plain_store_or_misses(tmp_path_factory, store_in, operations):
    directory = tmp_path_factory.mktemp("kv")
    plain, sealed = store_in(directory / "a", PAGE_BYTES), store_in(directory / "b", PAGE_BYTES, encryption=KEY)
    tiers = [plain.open(), sealed.open()]
    slots: list[dict[int, int]] = [{}, {}]
    hit = set()
    for name, number in operations:
        if name == "write" and number not in slots[0]:
            for store, tier, known in zip((plain, sealed), tiers, slots, strict=True):
                known |= store.write(tier, [number])
            hit.discard(number)
        elif name == "remove" and number in slots[0]:
            for tier, known in zip(tiers, slots, strict=True):
                tier.remove([known.pop(number)])
                assert tier.flush(30)
        elif name == "damage" and slots[1]:
            path = slot_file(sealed)
            at = number % path.stat().st_size
            edit(path, at, b"damage")
            hit |= {one for one, slot in slots[1].items() if (slot + 1) * STRIDE + 6 > at >= slot * STRIDE - 6}
        elif name == "reopen":
            assert all(tier.close() for tier in tiers)
            tiers = [plain.open(), sealed.open()]
            assert set(plain.held(tiers[0])) == set(sealed.held(tiers[1]))
    wanted, found = plain.read(tiers[0], slots[0]), sealed.read(tiers[1], slots[1])
    assert set(wanted.values()) <= {ReadOutcome.READ}
    assert {number for number, outcome in found.items() if outcome is not ReadOutcome.READ} <= hit
    assert all(tier.close() for tier in tiers)


def test_prune_needs_no_key(store, slots):
    tier = store.open()
    for number in range(0, PAGES, 3):
        tier.touch(slots[number], 1000.0, 2)
    tier.close()
    (done,) = prune(store.directory, before=2000.0)
    assert (done.dropped, done.kept) == (7, 13)
    tier = store.open()
    held = store.held(tier)
    assert set(held) == {store.pages.key(number) for number in range(PAGES) if number % 3}
    store.check_serves(tier, {number: held[store.pages.key(number)].slot for number in slots if number % 3})
    tier.close()


def test_a_reader_without_the_key_sees_what_is_in_the_clear(store, slots):
    (path,) = (path for path in store.directory.iterdir() if path.is_dir())
    for key in (None, OTHER):
        with closing(StoreReader(path, key)) as reader:
            assert reader.summary().pages == PAGES
            assert len(list(reader.last_uses())) == PAGES
            assert KEY.id in reader.fingerprint.describe()["encryption"]
            with pytest.raises(KeyNeededError):
                list(reader.records())
    with closing(StoreReader(path, KEY)) as reader:
        assert all(reader.is_good(record) for record in reader.records())
        edit(slot_file(store), slots[3] * STRIDE + 5, b"x")
        assert [r.slot for r in reader.records() if not reader.is_good(r)] == [slots[3]]


@pytest.mark.parametrize("umask", [0o000, 0o002, 0o022])
def test_all_that_is_made_is_for_the_owner_alone(store, umask):
    before = os.umask(umask)
    try:
        tier = store.open()
        store.write(tier, list(range(10)))
        modes = {
            path.name: stat.S_IMODE(path.stat().st_mode)
            for path in [store.directory, *store.directory.rglob("*")]
        }
        tier.close()
    finally:
        os.umask(before)
    assert {"index.sqlite3-wal", "index.sqlite3-shm", "fingerprint.json", "cached-attention.lock"} <= set(modes)
    assert {name: mode for name, mode in modes.items() if mode not in (0o600, 0o700)} == {}


def test_files_that_were_open_to_others_are_closed(store, slots):
    for path in store.directory.rglob("*"):
        path.chmod(0o755 if path.is_dir() else 0o644)
    tier = store.open()
    store.check_serves(tier, slots)
    modes = {stat.S_IMODE(path.stat().st_mode) for path in store.directory.rglob("*")}
    tier.close()
    assert modes <= {0o600, 0o700}


def test_a_directory_that_others_can_write_is_refused(store):
    store.directory.mkdir()
    store.directory.chmod(0o770)
    with pytest.raises(PermissionError, match="0770"):
        store.open()


def test_the_key_is_in_no_file_and_no_log(store, caplog):
    caplog.set_level(logging.DEBUG)
    secret = os.urandom(32)
    tier = store.open(encryption=EncryptionKey(secret))
    store.write(tier, [1, 2])
    tier.close()
    everything = b"".join(path.read_bytes() for path in files(store)) + caplog.text.encode()
    for part, following in pairwise([secret[at : at + 8] for at in range(0, 33, 8)]):
        assert part not in everything, following
        assert part.hex().encode() not in everything
