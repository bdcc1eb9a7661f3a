"""Page metadata in the index, as rows of SQLite: unencrypted or encrypted."""

from __future__ import annotations

import struct
import time
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple, Protocol

import xxhash

from cached_attention.index import KEY_BYTES
from cached_attention.tiers.cipher import TAG_BYTES, StoreCipher
from cached_attention.tiers.disk_space import ROW_BYTES, SEALED_ROW_BYTES

_UNSIGNED = (1 << 64) - 1
_FIXED = struct.Struct("<qqQ")
_SECRET = struct.Struct(f"<qQ?{KEY_BYTES}s{KEY_BYTES}s")
Row = tuple[Any, ...]
"""Values of a row; the slot comes first."""


class DiskRecord(NamedTuple):
    """A page on disk."""

    key: bytes
    slot: int
    parent: bytes | None
    """Key of the preceding page; None at the start of a prompt."""
    base_position: int
    checksum: int
    """Unsigned 64 bits, see `page_checksum`."""
    last_use: float
    """Seconds since the epoch."""
    uses: int


class RecordColumns(NamedTuple):
    """Many `DiskRecord`s, one sequence per field."""

    key: Sequence[bytes]
    slot: Sequence[int]
    parent: Sequence[bytes | None]
    base_position: Sequence[int]
    checksum: Sequence[int]
    last_use: Sequence[float]
    uses: Sequence[int]


class Rows(Protocol):
    """Converts between records and rows of the table `pages`, which always has `slot`, `last_use` and `uses`."""

    table: str
    """SQL definition of its columns."""
    columns: str
    malformed: str
    """SQL condition that none of our rows satisfies."""
    most_bytes: int
    """Most bytes that a row can take in the index file."""

    def row(self, record: DiskRecord) -> Row: ...

    def records(self, rows: Iterable[Row], damaged: list[int]) -> Iterator[DiskRecord]:
        """Records of `rows`; slots of rows that are not as they were written are added to `damaged`."""

    def record_columns(self, rows: Iterator[list[Row]]) -> Iterator[RecordColumns]:
        """The same for every page of a store, possibly millions, without `damaged`."""

    def moved(self, row: Row, slot: int) -> Row | None:
        """Row of the same page in `slot`; None if the row is damaged."""


class PlainRows:
    """Unencrypted, with a seal over the fixed fields: a damaged row would misdescribe an intact page."""

    table = """
        slot INTEGER PRIMARY KEY,
        key BLOB NOT NULL,
        parent BLOB,
        base_position INTEGER NOT NULL,
        checksum INTEGER NOT NULL,
        last_use REAL NOT NULL,
        uses INTEGER NOT NULL,
        seal BLOB NOT NULL"""
    columns = "slot, key, parent, base_position, checksum, last_use, uses, seal"
    malformed = f"length(key) <> {KEY_BYTES}"
    most_bytes = ROW_BYTES

    def row(self, record: DiskRecord) -> Row:
        key, slot, parent, base_position, checksum, last_use, uses = record
        seal = _seal(slot, key, parent, base_position, checksum)
        return slot, key, parent, base_position, _signed(checksum), last_use, uses, seal

    def records(self, rows: Iterable[Row], damaged: list[int]) -> Iterator[DiskRecord]:
        now = time.time()
        for slot, key, parent, base_position, signed, last_use, uses, seal in rows:
            checksum = signed & _UNSIGNED
            if _seal(slot, key, parent, base_position, checksum) == seal:
                yield DiskRecord(key, slot, parent, base_position, checksum, plausible(last_use, now), uses)
            else:
                damaged.append(slot)

    def record_columns(self, rows: Iterator[list[Row]]) -> Iterator[RecordColumns]:
        now = time.time()
        for some in rows:
            slots, keys, parents, positions, signed, last_uses, uses, seals = zip(*some, strict=True)
            checksums = [value & _UNSIGNED for value in signed]
            parts = zip(
                map(_FIXED.pack, slots, positions, checksums), keys, [key or b"" for key in parents], strict=True
            )
            if tuple(map(xxhash.xxh3_64_digest, map(b"".join, parts))) == seals:
                last_used = [plausible(use, now) for use in last_uses]
                yield RecordColumns(keys, slots, parents, positions, checksums, last_used, uses)
            elif good := list(self.records(some, damaged=[])):
                yield RecordColumns(*zip(*good, strict=True))

    def moved(self, row: Row, slot: int) -> Row | None:
        return next((self.row(record._replace(slot=slot)) for record in self.records([row], [])), None)


class KeyNeededError(ValueError):
    """Content of an encrypted store was requested without its key."""


class SealedRows:
    """Slot and use unencrypted, all else encrypted, including page keys: they would confirm a guessed prompt.

    Args:
        cipher: None: rows can be moved, dropped and counted, but not read.
    """

    table = """
        slot INTEGER PRIMARY KEY,
        epoch BLOB NOT NULL,
        nonce BLOB NOT NULL,
        sealed BLOB NOT NULL,
        last_use REAL NOT NULL,
        uses INTEGER NOT NULL"""
    columns = "slot, epoch, nonce, sealed, last_use, uses"
    malformed = f"length(sealed) <> {_SECRET.size + TAG_BYTES}"
    most_bytes = SEALED_ROW_BYTES

    def __init__(self, cipher: StoreCipher | None) -> None:
        self._cipher = cipher

    def row(self, record: DiskRecord) -> Row:
        key, slot, parent, base_position, checksum, last_use, uses = record
        secret = _SECRET.pack(base_position, checksum, parent is not None, key, parent or b"")
        (epoch, cipher), nonce = self._opener.sealing()
        return slot, epoch, nonce, cipher.encrypt(nonce, secret, self._opener.context), last_use, uses

    def records(self, rows: Iterable[Row], damaged: list[int]) -> Iterator[DiskRecord]:
        from cryptography.exceptions import InvalidTag

        opener = self._opener
        for row in rows:
            try:
                (record,) = map(DiskRecord, *self._open(opener, [row]))
            except (InvalidTag, ValueError):
                damaged.append(row[0])
            else:
                yield record

    def record_columns(self, rows: Iterator[list[Row]]) -> Iterator[RecordColumns]:
        from cryptography.exceptions import InvalidTag

        opener = self._opener
        for some in rows:
            try:
                yield self._open(opener, some)
            except (InvalidTag, ValueError):
                if good := list(self.records(some, damaged=[])):
                    yield RecordColumns(*zip(*good, strict=True))

    def moved(self, row: Row, slot: int) -> Row | None:
        return slot, *row[1:]

    @property
    def _opener(self) -> StoreCipher:
        if self._cipher is None:
            raise KeyNeededError("encrypted: its key is needed")
        return self._cipher

    @staticmethod
    def _open(opener: StoreCipher, rows: Sequence[Row]) -> RecordColumns:
        of_epoch, context, now = opener.of_epoch, opener.context, time.time()
        slots, epochs, nonces, sealed, last_uses, uses = zip(*rows, strict=True)
        secrets = b"".join(
            [
                of_epoch(epoch).decrypt(nonce, secret, context)
                for epoch, nonce, secret in zip(epochs, nonces, sealed, strict=True)
            ]
        )
        positions, checksums, follow, keys, parents = zip(*_SECRET.iter_unpack(secrets), strict=True)
        known = [parent if follows else None for follows, parent in zip(follow, parents, strict=True)]
        return RecordColumns(
            keys, slots, known, positions, checksums, [plausible(use, now) for use in last_uses], uses
        )


def plausible(last_use: float, now: float) -> float:
    """`last_use`, or 0 if it cannot be right.

    Not sealed, because it changes: a clock set back, or damage, must not make a page immortal.
    """
    return last_use if 0 <= last_use <= now else 0.0


def _signed(value: int) -> int:
    return value - (1 << 64) if value >> 63 else value


def _seal(slot: int, key: bytes, parent: bytes | None, base_position: int, checksum: int) -> bytes:
    return xxhash.xxh3_64_digest(b"".join((_FIXED.pack(slot, base_position, checksum), key, parent or b"")))
