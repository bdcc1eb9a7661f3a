"""The durable index of a disk store: one SQLite row per page, by slot."""

from __future__ import annotations

import logging
import os
import sqlite3
import struct
import sys
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple
from urllib.parse import quote

import xxhash

from cached_attention.tiers.disk_files import FileIO
from cached_attention.tiers.disk_space import SECTOR, TRANSACTION_ROWS, Space

logger = logging.getLogger(__name__)

APPLICATION_ID = 0x4341_4B56
KEY_BYTES = 32
_SCHEMA = """
CREATE TABLE meta (name TEXT PRIMARY KEY, value TEXT NOT NULL) STRICT, WITHOUT ROWID;
CREATE TABLE pages (
    slot INTEGER PRIMARY KEY,
    key BLOB NOT NULL,
    parent BLOB,
    base_position INTEGER NOT NULL,
    checksum INTEGER NOT NULL,
    last_use REAL NOT NULL,
    uses INTEGER NOT NULL,
    seal BLOB NOT NULL
) STRICT;
"""
_SETTINGS = (
    f"PRAGMA page_size = {SECTOR}",
    "PRAGMA synchronous = FULL",
    "PRAGMA wal_autocheckpoint = 0",
    "PRAGMA cache_spill = OFF",
    "PRAGMA temp_store = MEMORY",
    "PRAGMA trusted_schema = OFF",
    "PRAGMA cell_size_check = ON",
)
INDEX_ERRORS = (sqlite3.Error, UnicodeError)
"""UnicodeError: sqlite3 decodes SQLite's message, which may quote a damaged name."""
_COLUMNS = "slot, key, parent, base_position, checksum, last_use, uses, seal"
_BUSY_SECONDS = 0.05
"""How long the owner waits for readers, which never keep it from anything but emptying the log."""
_DROP_ROWS = 4 * TRANSACTION_ROWS
_UNSEALED_AT_ONCE = 512
"""Rows: enough to work in columns, few enough not to set off the garbage collector."""
_UNSIGNED = (1 << 64) - 1
_FIXED = struct.Struct("<qqQ")
Row = tuple[int, bytes, bytes | None, int, int, float, int, bytes]


class DiskRecord(NamedTuple):
    """A page on disk."""

    key: bytes
    slot: int
    parent: bytes | None
    """Key of the page before it; None at the start of a prompt."""
    base_position: int
    checksum: int
    """Unsigned 64 bits, see `page_checksum`."""
    last_use: float
    """Seconds since the epoch."""
    uses: int


class RecordColumns(NamedTuple):
    """Many `DiskRecord`s, one sequence for each of its fields."""

    key: Sequence[bytes]
    slot: Sequence[int]
    parent: Sequence[bytes | None]
    base_position: Sequence[int]
    checksum: Sequence[int]
    last_use: Sequence[float]
    uses: Sequence[int]


@dataclass
class Changes:
    """One transaction."""

    saved: list[DiskRecord] = field(default_factory=list)
    removed: list[int] = field(default_factory=list)
    """Slots."""
    touched: dict[int, tuple[float, int]] = field(default_factory=dict)
    """Slot -> last use, uses."""


class IndexHeldError(sqlite3.OperationalError):
    """A reader keeps the write-ahead log from being emptied, and it is at its limit."""


def _signed(value: int) -> int:
    return value - (1 << 64) if value >> 63 else value


def _seal(slot: int, key: bytes, parent: bytes | None, base_position: int, checksum: int) -> bytes:
    """Over what must not change in a row: a damaged row would lie about an intact page."""
    return xxhash.xxh3_64_digest(b"".join((_FIXED.pack(slot, base_position, checksum), key, parent or b"")))


def _to_row(record: DiskRecord) -> Row:
    key, slot, parent, base_position, checksum, last_use, uses = record
    seal = _seal(slot, key, parent, base_position, checksum)
    return slot, key, parent, base_position, _signed(checksum), last_use, uses, seal


def unseal(rows: Iterable[Row], damaged: list[int]) -> Iterator[DiskRecord]:
    """The records of `rows`; slots of rows that are not as they were written go to `damaged`."""
    now = time.time()
    for slot, key, parent, base_position, signed, last_use, uses, seal in rows:
        checksum = signed & _UNSIGNED
        if _seal(slot, key, parent, base_position, checksum) == seal:
            yield DiskRecord(key, slot, parent, base_position, checksum, _plausible(last_use, now), uses)
        else:
            damaged.append(slot)


def unseal_many(rows: sqlite3.Cursor) -> Iterator[RecordColumns]:
    """The same for every page of a store, of which there may be millions, without `damaged`."""
    now = time.time()
    while some := rows.fetchmany(_UNSEALED_AT_ONCE):
        slots, keys, parents, positions, signed, last_uses, uses, seals = zip(*some, strict=True)
        checksums = [value & _UNSIGNED for value in signed]
        parts = zip(
            map(_FIXED.pack, slots, positions, checksums), keys, [key or b"" for key in parents], strict=True
        )
        if tuple(map(xxhash.xxh3_64_digest, map(b"".join, parts))) == seals:
            plausible = [_plausible(use, now) for use in last_uses]
            yield RecordColumns(keys, slots, parents, positions, checksums, plausible, uses)
        elif good := list(unseal(some, damaged=[])):
            yield RecordColumns(*zip(*good, strict=True))


def _plausible(last_use: float, now: float) -> float:
    """Not sealed, because it changes: a clock set back, or damage, must not make a page immortal."""
    return last_use if 0 <= last_use <= now else 0.0


class DiskIndex:
    """Rows of the pages whose bytes are on stable storage.

    One thread at a time. An index that cannot be read, or that is not of this store, is replaced by
    an empty one: its pages are lost, which is what a cache may do.

    Args:
        identity: what the store is of; kept in the index and compared when it is opened.

    Raises:
        OSError, sqlite3.Error: the directory does not work.
    """

    def __init__(self, path: Path, identity: Mapping[str, str], io: FileIO) -> None:
        self.path = path
        self.replaced = False
        self._io = io
        self._identity = dict(identity)
        self._log_bytes, self._transaction_bytes = sys.maxsize, 0
        self._connection = self._open()
        self._inode = path.stat().st_ino

    def meta(self, name: str) -> str | None:
        row = self._connection.execute("SELECT value FROM meta WHERE name = ?", (name,)).fetchone()
        return row and row[0]

    def set_meta(self, name: str, value: str) -> None:
        """Durable on return."""
        self._make_room_in_log()
        self._connection.execute("INSERT OR REPLACE INTO meta VALUES (?, ?)", (name, value))

    def limit(self, space: Space) -> None:
        """Bound the index file and its log."""
        self._log_bytes, self._transaction_bytes = space.log_bytes, space.transaction_bytes
        self._connection.execute(f"PRAGMA max_page_count = {space.index_pages}")
        self._connection.execute(f"PRAGMA journal_size_limit = {space.log_bytes}")
        self._checkpoint()

    def drop(self, condition: str, *values: float) -> int:
        """Delete the rows that `condition` (SQL) holds for, in bounded transactions; how many there were."""
        dropped, last = 0, -(1 << 63)
        while last is not None:
            first = last
            row = self._connection.execute(
                "SELECT slot FROM pages WHERE slot >= ? ORDER BY slot LIMIT 1 OFFSET ?", (first, _DROP_ROWS)
            ).fetchone()
            last = row and row[0]
            end = "" if last is None else f"AND slot < {last}"
            self._make_room_in_log()
            dropped += self._connection.execute(
                f"DELETE FROM pages WHERE slot >= ? {end} AND ({condition})", (first, *values)
            ).rowcount
        return dropped

    def slots(self) -> Iterator[int]:
        return (slot for (slot,) in self._connection.execute("SELECT slot FROM pages"))

    def records(self) -> Iterator[DiskRecord]:
        """By slot, without damaged rows; rows may change between one record and the next."""
        return unseal(read_rows(self._connection), [])

    def apply(self, changes: Changes) -> None:
        """Commit; durable on return, all or nothing.

        Raises:
            OSError, sqlite3.Error: nothing is committed as far as this process goes. What a later
                start finds may be either, and is safe both ways.
        """
        if os.stat(self.path).st_ino != self._inode:
            raise FileNotFoundError("the index was replaced under the running store")
        self._make_room_in_log()
        execute = self._connection
        execute.execute("BEGIN IMMEDIATE")
        try:
            execute.executemany("DELETE FROM pages WHERE slot = ?", [(slot,) for slot in changes.removed])
            execute.executemany(
                "INSERT OR REPLACE INTO pages VALUES (?, ?, ?, ?, ?, ?, ?, ?)", map(_to_row, changes.saved)
            )
            execute.executemany(
                "UPDATE pages SET last_use = ?, uses = ? WHERE slot = ?",
                [(last_use, uses, slot) for slot, (last_use, uses) in changes.touched.items()],
            )
            self._io.commit(self._connection)
        except BaseException:
            with suppress(*INDEX_ERRORS):
                self._connection.execute("ROLLBACK")
            raise

    def close(self) -> None:
        with suppress(*INDEX_ERRORS):
            self._checkpoint()
        self._connection.close()

    def _open(self) -> sqlite3.Connection:
        if self.path.exists():
            connection = None
            try:
                connection = self._connect()
                self._check(connection)
                return connection
            except INDEX_ERRORS as error:
                if connection:
                    connection.close()
                if not _is_damage(error):
                    raise
                logger.warning("%s is damaged (%s): the store starts empty.", self.path, error)
                self.replaced = True
        return self._create()

    def _connect(self) -> sqlite3.Connection:
        # SQLite gives its log the mode of the index file, but would make that with the umask's.
        os.close(self._io.open(self.path, os.O_RDWR | os.O_CREAT))
        connection = sqlite3.connect(
            self.path, timeout=_BUSY_SECONDS, isolation_level=None, check_same_thread=False
        )
        connection.text_factory = lambda text: text.decode(errors="replace")
        for setting in _SETTINGS:
            connection.execute(setting)
        (mode,) = connection.execute("PRAGMA journal_mode = WAL").fetchone()
        if mode != "wal":
            connection.close()
            raise OSError(f"{self.path}: no write-ahead log on this file system; give a local directory.")
        return connection

    def _check(self, connection: sqlite3.Connection) -> None:
        (application,) = connection.execute("PRAGMA application_id").fetchone()
        found = dict(connection.execute("SELECT name, value FROM meta")) if application == APPLICATION_ID else {}
        wrong = {name for name, value in self._identity.items() if found.get(name) != value}
        if wrong:
            raise sqlite3.DatabaseError(f"not this store's index: {', '.join(sorted(wrong))}")
        (verdict,) = connection.execute("PRAGMA quick_check(1)").fetchone()
        if verdict != "ok":
            raise sqlite3.DatabaseError(verdict)

    def _create(self) -> sqlite3.Connection:
        self._remove()
        connection = self._connect()
        connection.execute("BEGIN")
        connection.execute(f"PRAGMA application_id = {APPLICATION_ID}")
        for statement in _SCHEMA.split(";\n"):
            connection.execute(statement)
        connection.executemany("INSERT INTO meta VALUES (?, ?)", self._identity.items())
        connection.execute("COMMIT")
        connection.execute("PRAGMA wal_checkpoint(TRUNCATE)")
        self._io.sync_directory(self.path.parent)
        return connection

    def _remove(self) -> None:
        for end in ("-wal", "-shm", "-journal", ""):
            with suppress(FileNotFoundError):
                self._io.unlink(Path(f"{self.path}{end}"))

    def _make_room_in_log(self) -> None:
        log = Path(f"{self.path}-wal")
        if not log.exists() or log.stat().st_size + self._transaction_bytes <= self._log_bytes:
            return
        if not self._checkpoint():
            raise IndexHeldError(f"{log} is at its limit and a reader keeps it from being emptied")

    def _checkpoint(self) -> bool:
        """Move the log's content to the index and empty it; False while a reader needs it."""
        (busy, _, _) = self._connection.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchone()
        return not busy


def _is_damage(error: Exception) -> bool:
    """Whether it says that the content is wrong, rather than that the file system does not work."""
    if isinstance(error, sqlite3.OperationalError):
        # Of these only a missing table or column, or a broken schema, are about the content.
        return getattr(error, "sqlite_errorcode", sqlite3.SQLITE_ERROR) == sqlite3.SQLITE_ERROR
    return True


def open_read_only(path: Path) -> sqlite3.Connection:
    """A reader beside the owner. Keep transactions short: a log that is being read cannot be emptied.

    Raises:
        INDEX_ERRORS: not an index, or not readable.
    """
    connection = sqlite3.connect(f"file:{quote(str(path))}?mode=ro", uri=True, timeout=1)
    try:
        connection.execute("SELECT count(*) FROM meta").fetchone()
    except sqlite3.OperationalError:
        # Without its log's files, in a directory that takes none, an index is only readable as a constant.
        connection.close()
        connection = sqlite3.connect(f"file:{quote(str(path))}?immutable=1", uri=True, timeout=1)
    return connection


def is_newest(connection: sqlite3.Connection, record: DiskRecord) -> bool:
    """Whether the row is still what it was when `record` was read from it."""
    row = connection.execute("SELECT key, checksum FROM pages WHERE slot = ?", (record.slot,)).fetchone()
    return row == (record.key, _signed(record.checksum))


def stream_rows(connection: sqlite3.Connection) -> sqlite3.Cursor:
    """Every row, by slot, in one transaction: the log cannot be emptied until the last one."""
    return connection.execute(f"SELECT {_COLUMNS} FROM pages ORDER BY slot")


def read_rows(connection: sqlite3.Connection, chunk: int = 256) -> Iterator[Row]:
    """Every row, by slot, in transactions of `chunk` rows that end before the rows are given out."""
    last = -(1 << 63)
    while rows := connection.execute(
        f"SELECT {_COLUMNS} FROM pages WHERE slot > ? ORDER BY slot LIMIT {chunk}", (last,)
    ).fetchall():
        yield from rows
        last = rows[-1][0]
