"""Opens a disk store as the last process left it, however that process ended."""

from __future__ import annotations

import errno
import logging
import shutil
import time
from contextlib import closing, suppress
from dataclasses import dataclass
from pathlib import Path

from cached_attention.encryption import EncryptionKey
from cached_attention.fingerprint import Fingerprint
from cached_attention.tiers.disk_directory import (
    INDEX_NAME,
    DirectoryInUseError,
    DirectoryLock,
    is_owned,
    last_change,
    make_store,
    read_fingerprint,
    remove_store,
    stores,
)
from cached_attention.tiers.disk_files import FileIO, SlotFiles
from cached_attention.tiers.disk_format import store_format
from cached_attention.tiers.disk_growth import Growth
from cached_attention.tiers.disk_index import INDEX_ERRORS, DiskIndex, open_read_only
from cached_attention.tiers.disk_ranks import rank_directories
from cached_attention.tiers.disk_records import Records
from cached_attention.tiers.disk_rows import KeyNeededError
from cached_attention.tiers.disk_slots import SAVED
from cached_attention.tiers.disk_space import SECTOR, Space, disk_usage

logger = logging.getLogger(__name__)

SPARE = 1 << 20
"""Bytes: opening an index writes to its log."""
_RANGES = 100
"""Slot ranges per SQL condition."""


@dataclass
class OpenStore:
    """A store that this process owns, in a consistent state."""

    path: Path
    locks: list[DirectoryLock]
    index: DiskIndex
    files: SlotFiles
    growth: Growth
    records: Records
    space: Space
    room: int
    """Slots that there is room for, beside everything else in the directory."""
    states: bytearray
    """Per slot: SAVED if the index has a page, else FREE."""
    dropped: int
    """Pages found but not kept."""

    def close(self, slots: int) -> None:
        """Close; free the space of slots from `slots` on, which another store in the directory may need."""
        with suppress(OSError):
            self.files.cut(slots)
        self.index.close()
        self.files.close()
        for lock in self.locks:
            lock.release()


def open_store(
    directory: Path,
    whole: Path,
    fingerprint: Fingerprint,
    key: EncryptionKey | None,
    capacity: int,
    io: FileIO,
    ttl: float | None,
) -> OpenStore:
    """See `DiskTier` for arguments and errors."""
    rows, records, stride = store_format(fingerprint, key)
    if records is None:
        raise KeyNeededError(f"a store of {fingerprint.encryption} needs its key.")
    if Space.within(capacity, stride, row_bytes=rows.most_bytes).slots < 1:
        raise ValueError(
            f"{capacity:,} bytes of disk hold no page of {stride:,} bytes and its index: "
            f"give at least {stride + Space(stride, 1, 1, rows.most_bytes).reserve:,}."
        )
    locks = [DirectoryLock(directory)]
    try:
        if whole != directory:
            locks.append(DirectoryLock(whole, shared=True))
        before = None if ttl is None else time.time() - ttl
        if before is not None:
            remove_expired_stores(directory / fingerprint.name, whole, before)
        path = make_store(directory, fingerprint)
        if key is not None:
            _warn_of_plain_stores(directory)
        index = DiskIndex(path / INDEX_NAME, {"fingerprint": fingerprint.digest()}, io, rows)
        try:
            return _open(directory, path, locks, index, capacity, records, io, before)
        except BaseException:
            index.close()
            raise
    except BaseException as error:
        for lock in locks:
            lock.release()
        if isinstance(error, INDEX_ERRORS) and shutil.disk_usage(directory).free < SPARE:
            raise OSError(errno.ENOSPC, f"the file system is full ({error})", str(directory)) from error
        raise


def _open(
    directory: Path,
    path: Path,
    locks: list[DirectoryLock],
    index: DiskIndex,
    capacity: int,
    records: Records,
    io: FileIO,
    before: float | None,
) -> OpenStore:
    space, room = _plan(directory, path, index, capacity, records.stride, expires=before is not None)
    index.set_meta("slots_per_file", str(space.slots_per_file))
    index.limit(space)
    growth = Growth(directory, path, capacity, space.reserve)
    files = SlotFiles(path, space.stride, space.slots, space.slots_per_file, io, growth.allows)
    dropped = _drop(index, files, room, before)
    files.cut(room)
    states = bytearray(space.slots)
    for slot in index.slots():
        states[slot] = SAVED
    logger.info("%s: %d pages, room for %d.", path, states.count(SAVED), room)
    return OpenStore(path, locks, index, files, growth, records, space, room, states, dropped)


def _plan(
    directory: Path, path: Path, index: DiskIndex, capacity: int, stride: int, *, expires: bool
) -> tuple[Space, int]:
    """What the store may grow to, and the number of slots that there is room for beside everything else."""
    others = disk_usage(directory) - disk_usage(path)
    text = index.meta("slots_per_file") or ""
    per_file = int(text) if text.isascii() and text.isdigit() and 0 < int(text) < 1 << 40 else None
    space = Space.within(capacity, stride, per_file, index.rows.most_bytes)
    # An index created for a larger capacity does not shrink.
    excess = max(0, disk_usage(index.path) - space.index_pages * SECTOR)
    if excess:
        space = Space.within(capacity - excess, stride, per_file, index.rows.most_bytes)
    room = min(space.slots, max(0, capacity - others - excess - space.reserve) // stride)
    if room < 1:
        logger.warning(
            "%s: other files take %d of its %d bytes: nothing can be saved.", directory, others, capacity
        )
    siblings = [store for store in stores(directory) if store != path]
    if siblings:
        logger.warning(
            "%s: %d other store%s, of another model or other settings, take %d of its %d bytes, which leaves %d "
            "pages for this one%s. `cached-attention inspect` says what they are, `cached-attention prune` "
            "removes what is old.",
            directory,
            len(siblings),
            "s" if len(siblings) > 1 else "",
            sum(map(disk_usage, siblings)),
            capacity,
            room,
            " until they expire" if expires else "",
        )
    return space, room


def _drop(index: DiskIndex, files: SlotFiles, room: int, before: float | None) -> int:
    """Delete the rows of pages that cannot be served."""
    dropped = index.drop(
        f"slot < 0 OR slot >= ? OR {index.rows.malformed} OR last_use < ?",
        room,
        float("-inf") if before is None else before,
    )
    ranges = files.missing(room)
    for first in range(0, len(ranges), _RANGES):
        some = ranges[first : first + _RANGES]
        condition = " OR ".join("slot BETWEEN ? AND ?" for _ in some)
        dropped += index.drop(condition, *(end for low, high in some for end in (low, high - 1)))
    if dropped:
        logger.info("%s: %d pages dropped: expired, damaged, or beyond the capacity.", index.path, dropped)
    return dropped


def _warn_of_plain_stores(directory: Path) -> None:
    found = [store for store in stores(directory) if (read := read_fingerprint(store)) and not read.encryption]
    if found:
        logger.warning(
            "%s: %d stores from before encryption are still readable by whoever gets the disk: %s. They go when "
            "their pages expire; `cached-attention prune` removes what is older, or remove these directories.",
            directory,
            len(found),
            ", ".join(store.name for store in found),
        )


def remove_expired_stores(own: Path, whole: Path, before: float) -> None:
    """Remove other fingerprints' stores whose pages were all last used before `before`.

    Also those in directories of ranks below `whole` that nobody owns: servers with another number of ranks left
    them. The caller owns the directory of its store `own`.
    """
    directory = own.parent
    for store in sorted({*stores(directory), *stores(whole)} - {own}):
        _remove_if_expired(store, before)
    for path in rank_directories(whole):
        if path != directory and path.is_dir() and not is_owned(path):
            with suppress(DirectoryInUseError, OSError):
                lock = DirectoryLock(path)
                try:
                    for store in stores(path):
                        _remove_if_expired(store, before)
                finally:
                    lock.release()


def _remove_if_expired(store: Path, before: float) -> None:
    with suppress(OSError):
        newest = _newest_use(store)
        if newest is None or newest < before:
            logger.warning("%s: removed, every page in it had expired (%d bytes).", store, remove_store(store))


def _newest_use(store: Path) -> float | None:
    """When a page in the store was last used; None if it has none.

    For a store that cannot be read, as it is damaged or of another version, when it was last written.
    """
    if read_fingerprint(store) is not None:
        with suppress(*INDEX_ERRORS), closing(open_read_only(store / INDEX_NAME)) as connection:
            (newest,) = connection.execute("SELECT max(last_use) FROM pages").fetchone()
            return newest
    return last_change(store)
