"""The durable index of a disk store: one SQLite row per page, by slot."""

from __future__ import annotations

import logging
import os
import sqlite3
import sys
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import quote

from cached_attention.tiers.disk_files import FileIO
from cached_attention.tiers.disk_rows import DiskRecord, PlainRows, Row, Rows
from cached_attention.tiers.disk_space import SECTOR, TRANSACTION_ROWS, Space

logger = logging.getLogger(__name__)

APPLICATION_ID = 0x4341_4B56
_SCHEMA = """
CREATE TABLE meta (name TEXT PRIMARY KEY, value TEXT NOT NULL) STRICT, WITHOUT ROWID;
CREATE TABLE pages ({pages}) STRICT;
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
"""UnicodeError: sqlite3 decodes SQLite's messages, which may quote a damaged name."""
_BUSY_SECONDS = 0.05
"""How long the owner waits for readers; all they can delay is emptying the log."""
_DROP_ROWS = 4 * TRANSACTION_ROWS
_CHUNK = 512
"""Rows: enough to process by column, few enough not to trigger the garbage collector."""


@dataclass
class Changes:
    """Changes of one transaction."""

    saved: list[DiskRecord] = field(default_factory=list)
    moved: list[Row] = field(default_factory=list)
    """Rows of pages that moved to another slot, see `Rows.moved`."""
    removed: list[int] = field(default_factory=list)
    """Slots."""
    touched: dict[int, tuple[float, int]] = field(default_factory=dict)
    """Slot -> last use, uses."""


class IndexHeldError(sqlite3.OperationalError):
    """The write-ahead log is at its limit, and a reader keeps it from being emptied."""


class DiskIndex:
    """Rows of the pages whose bytes are on stable storage.

    One thread at a time. An index that is damaged or belongs to another store is replaced by an empty one: its
    pages are lost, as they may be in a cache.

    Args:
        identity: identifies the store; kept in the index and compared when it is opened.
        rows: how page metadata is stored.

    Raises:
        OSError, sqlite3.Error: the directory cannot be used.
    """

    def __init__(self, path: Path, identity: Mapping[str, str], io: FileIO, rows: Rows | None = None) -> None:
        self.path = path
        self.rows = rows or PlainRows()
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
        """Limit the size of the index file and its log."""
        self._log_bytes, self._transaction_bytes = space.log_bytes, space.transaction_bytes
        self._connection.execute(f"PRAGMA max_page_count = {space.index_pages}")
        self._connection.execute(f"PRAGMA journal_size_limit = {space.log_bytes}")
        self._checkpoint()

    def drop(self, condition: str, *values: float) -> int:
        """Delete the rows that satisfy `condition` (SQL), in bounded transactions; returns their number."""
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

    def every_row(self) -> Iterator[Row]:
        """All rows, by slot; rows may change during iteration."""
        return read_rows(self._connection, self.rows)

    def apply(self, changes: Changes) -> None:
        """Commit atomically; durable on return.

        Raises:
            OSError, sqlite3.Error: as far as this process is concerned, nothing is committed. After a restart the
                changes may or may not be present; both are safe.
        """
        if os.stat(self.path).st_ino != self._inode:
            raise FileNotFoundError("the index was replaced under the running store")
        self._make_room_in_log()
        execute = self._connection
        execute.execute("BEGIN IMMEDIATE")
        try:
            execute.executemany("DELETE FROM pages WHERE slot = ?", [(slot,) for slot in changes.removed])
            saved = [*map(self.rows.row, changes.saved), *changes.moved]
            execute.executemany(f"INSERT OR REPLACE INTO pages VALUES ({self._places})", saved)
            execute.executemany(
                "UPDATE pages SET last_use = ?, uses = ? WHERE slot = ?",
                [(last_use, uses, slot) for slot, (last_use, uses) in changes.touched.items()],
            )
            self._io.commit(self._connection)
        except BaseException:
            with suppress(*INDEX_ERRORS):
                self._connection.execute("ROLLBACK")
            raise

    @property
    def _places(self) -> str:
        return ", ".join("?" for _ in self.rows.columns.split(", "))

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
                if not is_damage(error):
                    raise
                logger.warning("%s is damaged (%s): the store starts empty.", self.path, error)
        return self._create()

    def _connect(self) -> sqlite3.Connection:
        # SQLite gives its log the mode of the index file, but would create that with the umask's mode.
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
        for statement in _SCHEMA.format(pages=self.rows.table).split(";\n"):
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
        """Move the log's content into the index and empty the log; False if a reader still needs it."""
        (busy, _, _) = self._connection.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchone()
        return not busy


def is_damage(error: Exception) -> bool:
    """Whether the error is about the content rather than the file system."""
    if isinstance(error, sqlite3.OperationalError):
        # Only a missing table or column, or a broken schema, is about the content.
        return getattr(error, "sqlite_errorcode", sqlite3.SQLITE_ERROR) == sqlite3.SQLITE_ERROR
    return True


def open_read_only(path: Path) -> sqlite3.Connection:
    """Open a reader beside the owner. Keep transactions short: a log that is being read cannot be emptied.

    Raises:
        INDEX_ERRORS: not an index, or not readable.
    """
    if not path.exists():
        # SQLite's error would be one about the file system.
        raise sqlite3.DatabaseError(f"{path.name} is missing")
    connection = sqlite3.connect(f"file:{quote(str(path))}?mode=ro", uri=True, timeout=1)
    try:
        connection.execute("SELECT count(*) FROM meta").fetchone()
    except sqlite3.OperationalError:
        # Without its log files, in a directory that cannot be written, an index can only be opened as immutable.
        connection.close()
        connection = sqlite3.connect(f"file:{quote(str(path))}?immutable=1", uri=True, timeout=1)
    return connection


def find_row(connection: sqlite3.Connection, rows: Rows, slot: int) -> Row | None:
    found: Row | None = connection.execute(f"SELECT {rows.columns} FROM pages WHERE slot = ?", (slot,)).fetchone()
    return found


def stream_rows(connection: sqlite3.Connection, rows: Rows) -> Iterator[list[Row]]:
    """Every row, by slot, in one transaction: the log cannot be emptied before the last row is read."""
    cursor = connection.execute(f"SELECT {rows.columns} FROM pages ORDER BY slot")
    return iter(lambda: cursor.fetchmany(_CHUNK), [])


def read_rows(connection: sqlite3.Connection, rows: Rows, chunk: int = 256) -> Iterator[Row]:
    """Every row, by slot, in transactions of `chunk` rows that end before the rows are yielded."""
    last = -(1 << 63)
    while some := connection.execute(
        f"SELECT {rows.columns} FROM pages WHERE slot > ? ORDER BY slot LIMIT {chunk}", (last,)
    ).fetchall():
        yield from some
        last = some[-1][0]
