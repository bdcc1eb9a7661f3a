"""Whatever happens to the files, no wrong byte is returned and no exception reaches the caller."""

import os
import random
import shutil
import sqlite3

import pytest

from cached_attention.encryption import EncryptionKey
from cached_attention.tiers.page_io import PageRead, ReadOutcome

MUTATIONS = int(os.environ.get("CACHED_ATTENTION_TEST_MUTATIONS", "10000"))
PER_STORE = 25
PAGES = 120
PAGE_BYTES = 4000
STRIDE = 4096


class Damage:
    """Seeded mutations of a closed store."""

    def __init__(self, path, seed):
        self.path = path
        self.chance = random.Random(seed)
        self.index = path / "index.sqlite3"

    def one(self):
        """Mostly of one page; what may cost many is rare, so that something is left to serve."""
        kinds = [self.flip, self.swap, self.copy, self.zero, self.row, self.twin_row, self.swap_rows]
        if self.chance.random() < 0.1:
            kinds = [self.garbage, self.cut, self.meta, self.flip_index, self.cut_index, self.other_file]
        self.chance.choice(kinds)()

    def slot_file(self):
        return self.chance.choice(sorted(self.path.glob("pages-*.bin")) or [self.path / "pages-000000.bin"])

    def edit(self, path, change):
        if path.is_file():
            with open(path, "r+b") as file:
                size = os.fstat(file.fileno()).st_size
                if size:
                    change(file, size)

    def write_at(self, path, place, data):
        def change(file, size):
            file.seek(place % size)
            file.write(data)

        self.edit(path, change)

    def flip(self, path=None):
        def change(file, size):
            place = self.chance.randrange(min(size, PAGES * STRIDE))
            file.seek(place)
            byte = file.read(1)[0]
            file.seek(place)
            file.write(bytes([byte ^ 1 << self.chance.randrange(8)]))

        self.edit(path or self.slot_file(), change)

    def record(self, path, slot):
        with open(path, "rb") as file:
            file.seek(slot * STRIDE)
            return file.read(STRIDE)

    def swap(self):
        path, (a, b) = self.slot_file(), self.chance.sample(range(PAGES), 2)
        if path.exists():
            first, second = self.record(path, a), self.record(path, b)
            self.write_at(path, a * STRIDE, second)
            self.write_at(path, b * STRIDE, first)

    def copy(self):
        path, (a, b) = self.slot_file(), self.chance.sample(range(PAGES), 2)
        if path.exists():
            self.write_at(path, a * STRIDE, self.record(path, b))

    def zero(self):
        self.write_at(self.slot_file(), self.chance.randrange(PAGES) * STRIDE, bytes(STRIDE))

    def garbage(self):
        self.write_at(self.slot_file(), self.chance.randrange(PAGES * STRIDE), self.chance.randbytes(3 * STRIDE))

    def cut(self):
        path = self.slot_file()
        if self.chance.random() < 0.2:
            path.unlink(missing_ok=True)
        self.edit(path, lambda file, size: file.truncate(self.chance.randrange(size // 2, size)))

    def sql(self, statement, *values):
        connection = sqlite3.connect(self.index, isolation_level=None)
        try:
            connection.execute(statement, values)
        except (sqlite3.Error, UnicodeError):
            pass
        finally:
            connection.close()

    def row(self):
        number = self.chance.choice([0, 1, -1, 64, self.chance.getrandbits(62), -(2**63), 2**63 - 1])
        column, value = self.chance.choice(
            [
                ("key", self.chance.randbytes(self.chance.choice([0, 31, 32, 33]))),
                ("parent", self.chance.choice([None, self.chance.randbytes(32)])),
                ("slot", number),
                ("base_position", number),
                ("checksum", number),
                ("uses", number),
                ("last_use", self.chance.choice([float("inf"), -1e300, 0.0, 1e18])),
                ("seal", self.chance.randbytes(8)),
                ("sealed", self.chance.randbytes(self.chance.choice([0, 16, 97]))),
                ("nonce", self.chance.randbytes(self.chance.choice([0, 12, 200]))),
                ("epoch", self.chance.randbytes(self.chance.choice([0, 16]))),
            ]
        )
        self.sql(f"UPDATE OR REPLACE pages SET {column} = ? WHERE slot = ?", value, self.chance.randrange(PAGES))

    def twin_row(self):
        columns = self.chance.choice(
            ["key, parent, base_position, checksum, last_use, uses, seal", "epoch, nonce, sealed, last_use, uses"]
        )
        slots = self.chance.randrange(2 * PAGES), self.chance.randrange(PAGES)
        values = f"SELECT ?, {columns} FROM pages WHERE slot = ?"
        self.sql(f"INSERT OR REPLACE INTO pages (slot, {columns}) {values}", *slots)

    def swap_rows(self):
        a, b = self.chance.sample(range(PAGES), 2)
        for source, target in ((a, -1), (b, a), (-1, b)):
            self.sql("UPDATE OR REPLACE pages SET slot = ? WHERE slot = ?", target, source)

    def meta(self):
        name = self.chance.choice(["slots_per_file", "fingerprint"])
        value = self.chance.choice(["", "0", "-3", "7", "99999999999999999999", "x"])
        self.sql("UPDATE meta SET value = ? WHERE name = ?", value, name)

    def flip_index(self):
        self.flip(self.index)

    def cut_index(self):
        self.edit(self.index, lambda file, size: file.truncate(self.chance.randrange(size)))

    def other_file(self):
        name = self.chance.choice(["index.sqlite3-wal", "index.sqlite3-shm", "fingerprint.json", "probe.bin"])
        (self.path / name).write_bytes(self.chance.randbytes(self.chance.choice([0, 10, 5000])))


@pytest.fixture(params=[None, EncryptionKey(bytes(range(32)))], ids=["plain", "encrypted"])
def filled(request, store_in, fast_path):
    store = store_in(fast_path / "filled", PAGE_BYTES, 2 << 20, request.param)
    tier = store.open()
    slots = store.write(tier, list(range(PAGES)))
    assert len(slots) == PAGES
    tier.close()
    return store, slots


def read_all(store, tier, slots):
    """By what the index says, and by what a caller that lived through the damage remembers."""
    records = [record for record in tier.records() if 0 <= record.base_position < PAGES * 64]
    reads = [PageRead(r.key, r.slot, r.checksum, store.pages.buffer()) for r in records]
    good = 0
    for record, page, outcome in zip(records, reads, tier.read(reads).result(30), strict=True):
        number = record.base_position // 64
        assert record.key == store.pages.key(number)
        assert record.parent == (store.pages.key(number - 1) if number % 10 else None)
        if outcome is ReadOutcome.READ:
            assert page.buffer[:PAGE_BYTES] == store.pages.record(number)
            good += 1
    assert ReadOutcome.UNAVAILABLE not in store.read(tier, slots).values()
    return good


def test_mutations_are_misses(filled, fast_path):
    store, slots = filled
    template, served = store.directory, []
    stores = MUTATIONS // PER_STORE
    for seed in range(stores if store.encryption is None else stores // 5):
        store.directory = fast_path / "damaged"
        shutil.copytree(template, store.directory)
        damage = Damage(next(store.directory.glob("?" * 16)), seed)
        for _ in range(PER_STORE):
            damage.one()
        tier = store.open()
        served.append(read_all(store, tier, slots))
        saved = store.write(tier, [500, 501])
        assert saved or not tier.free_slots
        store.check_serves(tier, saved)
        tier.check_invariants()
        assert tier.close()
        shutil.rmtree(store.directory)
    assert max(served) > PAGES // 2, "the damage left nothing to be right about"
    assert min(served) < PAGES


def test_damage_under_a_running_tier_is_a_miss(filled):
    store, slots = filled
    tier = store.open()
    damage = Damage(tier.path, 1)
    for _ in range(200):
        damage.chance.choice([damage.flip, damage.swap, damage.copy, damage.zero, damage.cut])()
        store.read(tier, slots)
    assert tier.stats.lost > 0
    assert tier.healthy
    tier.close()


def test_a_bad_sector_costs_its_own_page(filled, faulty_io):
    store, slots = filled
    tier = store.open(io=faulty_io)
    plain = faulty_io.preadv

    def preadv(fd, buffers, offset):
        first = offset // STRIDE
        if first <= 7 < first + len(buffers):
            raise OSError(5, "Input/output error")
        return plain(fd, buffers, offset)

    faulty_io.preadv = preadv
    outcomes = store.read(tier, slots)
    lost = [slots[number] for number, outcome in outcomes.items() if outcome is ReadOutcome.LOST]
    assert lost == [7]
    assert tier.healthy
    tier.close()


def test_a_replaced_index_is_logged(filled, caplog):
    store, _ = filled
    next(store.directory.rglob("index.sqlite3")).write_bytes(b"not an index" * 1000)
    tier = store.open()
    assert "damaged" in caplog.text
    assert not store.held(tier)
    assert tier.free_slots == tier.capacity_slots
    tier.close()
