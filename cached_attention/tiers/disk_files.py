"""Slot files: fixed-size page records in preallocated files."""

from __future__ import annotations

import errno
import logging
import mmap
import os
import re
import sqlite3
import threading
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from pathlib import Path

from cached_attention.permissions import close_to_others

logger = logging.getLogger(__name__)

GROWTH_BYTES = 1 << 30
"""A file is preallocated in steps of this size."""
FILE_NAME = re.compile(r"pages-(\d{6})\.bin")
PROBE_NAME = "probe.bin"
SECTOR = 4096
"""Bytes; O_DIRECT moves multiples of this, in memory and on disk."""
OUT_OF_SPACE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


class FileIO:
    """All operations that change or read back data on disk, in order. Tests inject faults here."""

    def open(self, path: Path, flags: int) -> int:
        fd = os.open(path, flags | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
        close_to_others(fd)
        return fd

    def close(self, fd: int) -> None:
        os.close(fd)

    def preadv(self, fd: int, buffers: Sequence[memoryview], offset: int) -> int:
        return os.preadv(fd, buffers, offset)

    def pwritev(self, fd: int, buffers: Sequence[memoryview], offset: int) -> int:
        return os.pwritev(fd, buffers, offset)

    def fdatasync(self, fd: int) -> None:
        os.fdatasync(fd)

    def allocate(self, fd: int, offset: int, length: int) -> None:
        os.posix_fallocate(fd, offset, length)

    def truncate(self, fd: int, length: int) -> None:
        os.ftruncate(fd, length)

    def unlink(self, path: Path) -> None:
        path.unlink()

    def commit(self, connection: sqlite3.Connection) -> None:
        connection.execute("COMMIT")

    def sync_directory(self, path: Path) -> None:
        """Make created and removed names in `path` durable."""
        fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            os.fsync(fd)
        finally:
            os.close(fd)


def file_name(number: int) -> str:
    return f"pages-{number:06}.bin"


class NoRoomError(OSError):
    """A slot file cannot grow: limited by the store itself or by the file system."""


class SlotFiles:
    """The records of one store: slot `s` is in file `s // slots_per_file`.

    Any thread may read and write different slots concurrently. Buffers are aligned to 4,096 bytes and `stride`
    bytes long.

    Args:
        stride: bytes per slot, a multiple of 4,096.
        slots: most slots that the store may have, over all its files.
        may_take: whether all files together may take a number of bytes; asked before one grows.
    """

    def __init__(
        self,
        directory: Path,
        stride: int,
        slots: int,
        slots_per_file: int,
        io: FileIO,
        may_take: Callable[[int], bool] = lambda _: True,
    ) -> None:
        self.directory = directory
        self.stride = stride
        self.slots = slots
        self.slots_per_file = slots_per_file
        self._io = io
        self._may_take = may_take
        self._lock = threading.Lock()
        self._growth = threading.Lock()
        self._fds: dict[int, int] = {}
        self._replaced: list[int] = []
        """Descriptors of files that were removed under the running store."""
        self._allocated = {number: path.stat().st_size for number, path in self._paths()}
        self.direct = True
        self.direct = self._takes_direct_io()

    def read(self, slot: int, buffers: Sequence[memoryview]) -> int:
        """Fill `buffers` from the slots that start at `slot`; returns the number of whole records.

        Raises:
            OSError: the device failed.
        """
        try:
            fd, offset = self._locate(slot)
        except FileNotFoundError:
            return 0
        return self._transfer(self._io.preadv, fd, buffers, offset) // self.stride

    def write(self, slot: int, buffers: Sequence[memoryview]) -> None:
        """Write whole records to the slots that start at `slot`; durable after `sync`.

        Raises:
            NoRoomError: the slots have no space on disk and cannot get any.
            OSError: not everything was written.
        """
        self._ensure_allocated(slot, len(buffers))
        fd, offset = self._locate(slot)
        if self._transfer(self._io.pwritev, fd, buffers, offset) < len(buffers) * self.stride:
            raise OSError(errno.EIO, f"short write to slot {slot} of {self.directory}")

    def sync(self, slots: Iterable[int]) -> None:
        """Make what was written to `slots` durable.

        Raises:
            OSError: it may not be durable.
        """
        for number in {slot // self.slots_per_file for slot in slots}:
            fd = self._fd(number)
            if os.fstat(fd).st_nlink == 0:
                if self.directory.exists():
                    self._replace(number)
                raise FileNotFoundError(errno.ENOENT, "removed under the running store", self._path(number))
            self._io.fdatasync(fd)

    def slots_held(self, number: int) -> int:
        """Whole records that file `number` has space for now."""
        return min(self._allocated.get(number, 0) // self.stride, self.slots_per_file)

    def has_space(self, slot: int) -> bool:
        """Whether a record can be written to `slot` without more space on disk."""
        number, place = divmod(slot, self.slots_per_file)
        return place < self.slots_held(number)

    def end(self) -> int:
        """One past the highest slot that any file has space for."""
        held = (number * self.slots_per_file + self.slots_held(number) for number in list(self._allocated))
        return max(held, default=0)

    def missing(self, slots: int) -> list[tuple[int, int]]:
        """Ranges `[first, last)` below `slots` that no file has space for; adjacent ones are joined."""
        ranges: list[tuple[int, int]] = []
        for first in range(0, slots, self.slots_per_file):
            low = first + self.slots_held(first // self.slots_per_file)
            high = min(first + self.slots_per_file, slots)
            if ranges and ranges[-1][1] == low:
                ranges[-1] = (ranges[-1][0], high)
            elif low < high:
                ranges.append((low, high))
        return ranges

    @property
    def allocated_bytes(self) -> int:
        return sum(list(self._allocated.values()))

    def cut(self, slots: int) -> None:
        """Free the space of slots from `slots` on, and of anything beyond a file's greatest length."""
        for number, path in self._paths():
            keep = max(0, min(slots - number * self.slots_per_file, self.slots_per_file)) * self.stride
            if keep == 0:
                self._forget(number)
                self._io.unlink(path)
            elif path.stat().st_size > keep:
                self._io.truncate(self._fd(number), keep)
                self._allocated[number] = keep

    def probe(self) -> None:
        """Write, sync and read back a small file.

        Raises:
            OSError: the directory cannot be used.
        """
        path = self.directory / PROBE_NAME
        page = memoryview(mmap.mmap(-1, SECTOR))
        fd = self._io.open(path, os.O_RDWR | os.O_CREAT | self._flags)
        try:
            self._io.pwritev(fd, [page], 0)
            self._io.fdatasync(fd)
            self._io.preadv(fd, [page], 0)
        finally:
            self._io.close(fd)
            self._io.unlink(path)

    def close(self) -> None:
        for number in list(self._fds):
            self._forget(number)
        while self._replaced:
            self._io.close(self._replaced.pop())

    @property
    def _flags(self) -> int:
        return os.O_DIRECT if self.direct else 0

    def _path(self, number: int) -> Path:
        return self.directory / file_name(number)

    def _paths(self) -> list[tuple[int, Path]]:
        found = ((FILE_NAME.fullmatch(path.name), path) for path in self.directory.iterdir())
        return sorted((int(match[1]), path) for match, path in found if match and path.is_file())

    def _locate(self, slot: int) -> tuple[int, int]:
        number, place = divmod(slot, self.slots_per_file)
        return self._fd(number), place * self.stride

    def _fd(self, number: int) -> int:
        with self._lock:
            fd = self._fds.get(number)
            if fd is None:
                fd = self._fds[number] = self._io.open(self._path(number), os.O_RDWR | self._flags)
            return fd

    def _replace(self, number: int) -> None:
        """What is written from now on goes to a new file; threads may still be using the old one."""
        with self._lock:
            self._allocated.pop(number, None)
            self._replaced.append(self._fds.pop(number))

    def _forget(self, number: int) -> None:
        with self._lock:
            self._allocated.pop(number, None)
            fd = self._fds.pop(number, None)
        if fd is not None:
            self._io.close(fd)

    def _transfer(
        self,
        move: Callable[[int, Sequence[memoryview], int], int],
        fd: int,
        buffers: Sequence[memoryview],
        offset: int,
    ) -> int:
        """Bytes moved: all of them, or up to the end of the file."""
        done, total = 0, len(buffers) * self.stride
        while done < total:
            whole, part = divmod(done, self.stride)
            rest = buffers if not done else [buffers[whole][part:], *buffers[whole + 1 :]]
            moved = move(fd, rest, offset + done)
            done += moved
            if moved == 0 or (self.direct and moved % SECTOR):
                break
        return done

    def _ensure_allocated(self, slot: int, count: int) -> None:
        number, place = divmod(slot, self.slots_per_file)
        need = (place + count) * self.stride
        if self._allocated.get(number, 0) >= need:
            return
        with self._growth:
            have = self._allocated.get(number, 0)
            if have < need:
                self._grow(number, have, need)

    def _grow(self, number: int, have: int, need: int) -> None:
        step = max(GROWTH_BYTES // self.stride, 1) * self.stride
        longest = min(self.slots_per_file, self.slots - number * self.slots_per_file) * self.stride
        length = min(max(need, have + step), longest) - have
        # Other files may leave less room than a step.
        taken = self.allocated_bytes
        while not (may_grow := self._may_take(taken + length)) and length > need - have:
            length = max(need - have, length // 2 // self.stride * self.stride)
        if not may_grow:
            raise NoRoomError(errno.ENOSPC, "the directory is at its size limit", str(self.directory))
        # glibc's fallback for file systems without fallocate writes single bytes, which O_DIRECT refuses.
        fd = self._io.open(self._path(number), os.O_RDWR | os.O_CREAT)
        try:
            self._allocate(fd, have, length)
        finally:
            self._io.close(fd)
        if have == 0:
            self._io.sync_directory(self.directory)
        self._allocated[number] = have + length

    def _allocate(self, fd: int, have: int, length: int) -> None:
        try:
            self._io.allocate(fd, have, length)
            self._io.fdatasync(fd)
        except OSError as error:
            with suppress(OSError):
                self._io.truncate(fd, have)
            if error.errno in OUT_OF_SPACE:
                raise NoRoomError(*error.args) from error
            raise

    def _takes_direct_io(self) -> bool:
        try:
            self.probe()
        except OSError as error:
            if error.errno in (errno.EINVAL, errno.ENOTSUP):
                logger.warning("%s: no O_DIRECT here, disk I/O uses the page cache.", self.directory)
                return False
            if error.errno not in OUT_OF_SPACE:
                raise
        return True
