"""Looking into a store from outside, beside the server that owns it or without one."""

from __future__ import annotations

import os
import sqlite3
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from cached_attention.checksum import page_checksum
from cached_attention.fingerprint import Fingerprint
from cached_attention.tiers.disk_directory import INDEX_NAME, read_fingerprint
from cached_attention.tiers.disk_files import file_name
from cached_attention.tiers.disk_index import (
    INDEX_ERRORS,
    DiskRecord,
    is_newest,
    open_read_only,
    read_rows,
    unseal,
)
from cached_attention.tiers.disk_space import slot_stride


@dataclass(frozen=True)
class StoreSummary:
    pages: int
    oldest: float | None
    """Last use of the page that was not used for longest, seconds since the epoch; None without pages."""
    newest: float | None
    uses: tuple[int, int, int]
    """Pages used once, two or three times, more often."""


class StoreReader:
    """Read-only, takes no lock: transactions are short, and a page that the owner changes meanwhile
    is no damage.

    Raises:
        ValueError: not a store of a format that this version knows.
        sqlite3.Error, UnicodeError: the index is not readable.
    """

    def __init__(self, path: Path) -> None:
        fingerprint = read_fingerprint(path)
        if fingerprint is None:
            raise ValueError(f"{path} is not a store, or one of another version of this program.")
        self.path = path
        self.fingerprint: Fingerprint = fingerprint
        self.stride = slot_stride(fingerprint.page_bytes)
        self.damaged_rows: list[int] = []
        self._index: sqlite3.Connection = open_read_only(path / INDEX_NAME)
        self._files: dict[int, int] = {}
        try:
            (per_file,) = self._index.execute("SELECT value FROM meta WHERE name = 'slots_per_file'").fetchone()
            self.slots_per_file = max(1, int(per_file))
        except (TypeError, ValueError):
            self.slots_per_file = 1

    def summary(self) -> StoreSummary:
        """One pass over the index."""
        pages, oldest, newest, once, few = self._index.execute(
            "SELECT count(*), min(last_use), max(last_use), total(uses < 2), total(uses IN (2, 3)) FROM pages"
        ).fetchone()
        return StoreSummary(pages, oldest, newest, (int(once), int(few), pages - int(once) - int(few)))

    def records(self) -> Iterator[DiskRecord]:
        """By slot; slots of damaged rows go to `damaged_rows`."""
        return unseal(read_rows(self._index), self.damaged_rows)

    def is_good(self, record: DiskRecord) -> bool:
        """Whether the record's bytes are what was saved, or no longer what the index speaks of."""
        for _ in range(2):
            try:
                data = self._read(record.slot)
            except FileNotFoundError:
                data = b""
            if page_checksum(record.key, data) == record.checksum:
                return True
            if not is_newest(self._index, record):
                return True
        return False

    def index_problem(self) -> str | None:
        """What SQLite finds wrong with the index itself."""
        try:
            (verdict,) = self._index.execute("PRAGMA quick_check(1)").fetchone()
        except INDEX_ERRORS as error:
            return str(error)
        return None if verdict == "ok" else verdict

    def close(self) -> None:
        self._index.close()
        for fd in self._files.values():
            os.close(fd)

    def _read(self, slot: int) -> bytes:
        number, place = divmod(slot, self.slots_per_file)
        fd = self._files.get(number)
        if fd is None:
            fd = os.open(self.path / file_name(number), os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
            self._files[number] = fd
        return os.pread(fd, self.fingerprint.page_bytes, place * self.stride)
