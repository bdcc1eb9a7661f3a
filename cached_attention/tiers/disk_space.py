"""How many pages fit, given a limit on the directory's file system blocks."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from cached_attention.tiers.disk_files import SECTOR

FILE_BYTES = 1 << 30
"""Smallest full size of a slot file."""
MOST_FILES = 64
"""Most slot files of a store, at the size it was created with: each is an open file."""
ROW_BYTES = 384
"""Most index bytes per page: a row has about 110, and SQLite's leaves are at least a third full."""
EXTENT_BYTES = 64
"""Most file system metadata per slot, counted in the file's blocks: one extent for every slot."""
SEALED_ROW_BYTES = 528
"""The same for encrypted rows, which have about 165."""
FIXED_BYTES = 24 * SECTOR
"""Directories, lock, fingerprint, probe file, and an index without rows."""
TRANSACTION_ROWS = 1024
"""Most rows changed by one commit."""
FRAME_BYTES = SECTOR + 24
"""One page in SQLite's write-ahead log."""


def slot_stride(page_bytes: int) -> int:
    """Bytes from one record to the next: `page_bytes` rounded up to a boundary that O_DIRECT accepts."""
    return -(-page_bytes // SECTOR) * SECTOR


def disk_usage(path: Path) -> int:
    """Bytes of file system blocks used by `path` and everything below it."""
    if not path.is_dir():
        return _blocks(path)
    names = (os.path.join(root, name) for root, _, files in os.walk(path) for name in ("", *files))
    return sum(map(_blocks, names))


def _blocks(path: str | Path) -> int:
    try:
        return os.lstat(path).st_blocks * 512
    except FileNotFoundError:
        return 0


@dataclass(frozen=True)
class Space:
    """Space that a store may use in a directory."""

    stride: int
    slots: int
    slots_per_file: int
    row_bytes: int = ROW_BYTES

    @classmethod
    def within(
        cls, budget: int, stride: int, slots_per_file: int | None = None, row_bytes: int = ROW_BYTES
    ) -> Space:
        """The most slots that, with everything that belongs to them, never take more than `budget` bytes.

        Args:
            slots_per_file: of the store's existing files, if any.
        """
        per_file = slots_per_file or max(FILE_BYTES, budget // MOST_FILES) // stride or 1
        most = cls(stride, max(budget, 0) // stride, per_file, row_bytes)
        rest = budget - most._overhead
        slots = max(0, rest // (stride + row_bytes + EXTENT_BYTES))
        return cls(stride, slots, per_file, row_bytes)

    @property
    def index_pages(self) -> int:
        """Size limit of the index file, in SQLite pages of 4 KiB."""
        return self.slots * self.row_bytes // SECTOR + 16

    @property
    def transaction_bytes(self) -> int:
        """Most bytes that one commit adds to the write-ahead log: a row dirties up to 4 pages, each once."""
        return min(4 * TRANSACTION_ROWS + 16, self.index_pages) * FRAME_BYTES + SECTOR

    @property
    def log_bytes(self) -> int:
        """Size limit of the write-ahead log."""
        return 2 * self.transaction_bytes

    @property
    def reserve(self) -> int:
        """Bytes that may be used in addition to the slots."""
        return self._overhead + self.slots * (self.row_bytes + EXTENT_BYTES)

    @property
    def _overhead(self) -> int:
        shared_memory = 32768 * (2 + self.log_bytes // (4000 * FRAME_BYTES))
        files = self.slots // self.slots_per_file + 1
        return FIXED_BYTES + self.log_bytes + shared_memory + files * 2 * SECTOR
