"""Reads a store from outside, while a server owns it or not."""

from __future__ import annotations

import os
import sqlite3
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from cached_attention.encryption import EncryptionKey
from cached_attention.fingerprint import Fingerprint
from cached_attention.tiers.disk_directory import INDEX_NAME, read_fingerprint
from cached_attention.tiers.disk_files import file_name
from cached_attention.tiers.disk_format import store_format
from cached_attention.tiers.disk_index import INDEX_ERRORS, find_row, open_read_only, read_rows
from cached_attention.tiers.disk_rows import DiskRecord, KeyNeededError, plausible
from cached_attention.tiers.disk_space import slot_stride
from cached_attention.tiers.page_io import PageRead


@dataclass(frozen=True)
class StoreSummary:
    pages: int
    oldest: float | None
    """Last use of the least recently used page, in seconds since the epoch; None without pages."""
    newest: float | None
    uses: tuple[int, int, int]
    """Pages used once, two or three times, more often."""


class StoreReader:
    """Reads a store without taking its lock: transactions are short, and a page that the owner changes meanwhile
    does not count as damaged.

    Args:
        key: without the key of an encrypted store, `records` and `is_good` raise KeyNeededError.

    Raises:
        ValueError: not a store in a format that this version knows.
        sqlite3.Error, UnicodeError: the index cannot be read.
    """

    def __init__(self, path: Path, key: EncryptionKey | None = None) -> None:
        fingerprint = read_fingerprint(path)
        if fingerprint is None:
            raise ValueError(f"{path} is not a store, or one of another version of this program.")
        self.path = path
        self.fingerprint: Fingerprint = fingerprint
        self.format = store_format(fingerprint, key)
        self.damaged_rows: list[int] = []
        self._index: sqlite3.Connection = open_read_only(path / INDEX_NAME)
        self._files: dict[int, int] = {}
        meta = dict(self._index.execute("SELECT name, value FROM meta"))
        if meta.get("fingerprint") != fingerprint.digest():
            raise sqlite3.DatabaseError("not this store's index: fingerprint")
        per_file = str(meta.get("slots_per_file"))
        self.slots_per_file = max(1, int(per_file)) if per_file.isdecimal() else 1

    def summary(self) -> StoreSummary:
        """Summarise the index in one pass."""
        pages, oldest, newest, once, few = self._index.execute(
            "SELECT count(*), min(last_use), max(last_use), total(uses < 2), total(uses IN (2, 3)) FROM pages"
        ).fetchone()
        return StoreSummary(pages, oldest, newest, (int(once), int(few), pages - int(once) - int(few)))

    def records(self) -> Iterator[DiskRecord]:
        """All records, by slot; slots of damaged rows are added to `damaged_rows`."""
        return self.format.rows.records(read_rows(self._index, self.format.rows), self.damaged_rows)

    def last_uses(self) -> Iterator[float]:
        """Last use of each page, in one transaction; needs no key."""
        now = time.time()
        return (plausible(last_use, now) for (last_use,) in self._index.execute("SELECT last_use FROM pages"))

    def is_good(self, record: DiskRecord) -> bool:
        """Whether the record's bytes are what was saved, or the index no longer refers to them."""
        for _ in range(2):
            if self._holds(record):
                return True
            if not self._is_newest(record):
                return True
        return False

    def _holds(self, record: DiskRecord) -> bool:
        records = self.format.records
        if records is None:
            raise KeyNeededError("encrypted: its key is needed")
        buffer = memoryview(bytearray(slot_stride(self.fingerprint.page_bytes)))
        page = PageRead(record.key, record.slot, record.checksum, buffer)
        found = records.incoming([page])
        try:
            whole = self._read(record.slot, found[0]) >= records.record_bytes
        except FileNotFoundError:
            return False
        return whole and records.accept(page, found[0])

    def _is_newest(self, record: DiskRecord) -> bool:
        """Whether the row is unchanged since `record` was read from it."""
        row = find_row(self._index, self.format.rows, record.slot)
        found = [] if row is None else list(self.format.rows.records([row], []))
        return [(one.key, one.checksum) for one in found] == [(record.key, record.checksum)]

    def index_problem(self) -> str | None:
        """Problem that SQLite finds in the index itself; None if there is none."""
        try:
            (verdict,) = self._index.execute("PRAGMA quick_check(1)").fetchone()
        except INDEX_ERRORS as error:
            return str(error)
        return None if verdict == "ok" else verdict

    def close(self) -> None:
        self._index.close()
        for fd in self._files.values():
            os.close(fd)

    def _read(self, slot: int, buffer: memoryview) -> int:
        number, place = divmod(slot, self.slots_per_file)
        fd = self._files.get(number)
        if fd is None:
            fd = os.open(self.path / file_name(number), os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
            self._files[number] = fd
        return os.preadv(fd, [buffer], place * self.format.stride)
