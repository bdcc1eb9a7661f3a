"""Disk stores with pages whose content follows from a number."""

import hashlib
import mmap
import os
import random
import tempfile
import time
from contextlib import suppress
from pathlib import Path

import pytest

from cached_attention.checksum import page_checksum
from cached_attention.encryption import EncryptionKey
from cached_attention.fingerprint import Fingerprint
from cached_attention.tiers.disk import DiskTier
from cached_attention.tiers.disk_files import FileIO
from cached_attention.tiers.disk_rows import DiskRecord
from cached_attention.tiers.disk_space import slot_stride
from cached_attention.tiers.page_io import PageRead, PageWrite, ReadOutcome


def make_fingerprint(page_bytes: int, weights: str = "w0") -> Fingerprint:
    layers = ((page_bytes // 2, page_bytes - page_bytes // 2),)
    return Fingerprint("m", weights, "bfloat16", 64, layers, {"tp_rank": 0, "tp_size": 1}, {"theta": 1e4})


class Pages:
    """Page `n` of a store: its key, bytes and buffers."""

    def __init__(self, page_bytes: int) -> None:
        self.page_bytes = page_bytes
        self.stride = slot_stride(page_bytes)

    def buffer(self) -> memoryview:
        return memoryview(mmap.mmap(-1, self.stride))

    def key(self, number: int) -> bytes:
        return hashlib.sha256(b"%d" % number).digest()

    def record(self, number: int) -> bytes:
        return random.Random(number).randbytes(self.page_bytes)

    def to_write(self, number: int, last_use: float | None = None, uses: int = 1) -> PageWrite:
        buffer = self.buffer()
        buffer[: self.page_bytes] = self.record(number)
        checksum = page_checksum(self.key(number), buffer[: self.page_bytes])
        parent = self.key(number - 1) if number % 10 else None
        last_use = time.time() if last_use is None else last_use
        return PageWrite(self.key(number), parent, number * 64, checksum, last_use, uses, buffer)

    def to_read(self, number: int, slot: int) -> PageRead:
        return PageRead(
            self.key(number), slot, page_checksum(self.key(number), self.record(number)), self.buffer()
        )


class Store:
    """A directory, and what a caller of the disk tier does with it."""

    def __init__(
        self,
        directory: Path,
        page_bytes: int = 5000,
        capacity: int = 4 << 20,
        encryption: EncryptionKey | None = None,
    ) -> None:
        self.directory = directory
        self.encryption = encryption
        self.pages = Pages(page_bytes)
        self.capacity = capacity

    def open(self, weights: str = "w0", **options: object) -> DiskTier:
        options.setdefault("io_threads", 2)
        options.setdefault("encryption", self.encryption)
        options.setdefault("probe_seconds", (0.02, 0.1))
        fingerprint = make_fingerprint(self.pages.page_bytes, weights)
        return DiskTier(self.directory, fingerprint, options.pop("capacity", self.capacity), **options)

    def write(self, tier: DiskTier, numbers: list[int], **options: float) -> dict[int, int]:
        """Number -> slot, of the pages that were saved."""
        slots = tier.write([self.pages.to_write(number, **options) for number in numbers]).result(30)
        return {number: slot for number, slot in zip(numbers, slots, strict=True) if slot is not None}

    def read(self, tier: DiskTier, slots: dict[int, int]) -> dict[int, ReadOutcome]:
        """Reads pages; fails at once where a page is reported as read and is not what it was."""
        reads = [self.pages.to_read(number, slot) for number, slot in slots.items()]
        outcomes = tier.read(reads).result(30)
        for number, page, outcome in zip(slots, reads, outcomes, strict=True):
            if outcome is ReadOutcome.READ:
                assert page.buffer[: self.pages.page_bytes] == self.pages.record(number)
        return dict(zip(slots, outcomes, strict=True))

    def held(self, tier: DiskTier) -> dict[bytes, DiskRecord]:
        return {record.key: record for record in tier.records()}

    def check_serves(self, tier: DiskTier, slots: dict[int, int]) -> None:
        assert set(self.read(tier, slots).values()) <= {ReadOutcome.READ}

    def usage(self) -> int:
        """Bytes on the file system, counted apart from the tier's own way."""
        total = 0
        for root, _, files in os.walk(self.directory):
            for name in [".", *files]:
                with suppress(FileNotFoundError):
                    total += os.lstat(os.path.join(root, name)).st_blocks * 512
        return total


class FaultyIO(FileIO):
    """`before` sees every step and may raise; see `FileIO` for their names."""

    def __init__(self) -> None:
        self.before = lambda step: None

    def preadv(self, fd, buffers, offset):
        self.before("preadv")
        return super().preadv(fd, buffers, offset)

    def pwritev(self, fd, buffers, offset):
        self.before("pwritev")
        return super().pwritev(fd, buffers, offset)

    def fdatasync(self, fd):
        self.before("fdatasync")
        super().fdatasync(fd)

    def allocate(self, fd, offset, length):
        self.before("allocate")
        super().allocate(fd, offset, length)

    def commit(self, connection):
        self.before("commit")
        super().commit(connection)


@pytest.fixture
def fast_path(tmp_path):
    """In memory where there is such a place: what is tested here does not depend on the device."""
    memory = Path("/dev/shm")
    if not (memory.is_dir() and os.access(memory, os.W_OK)):
        yield tmp_path
        return
    with tempfile.TemporaryDirectory(dir=memory) as path:
        yield Path(path)


@pytest.fixture
def store(fast_path):
    return Store(fast_path / "kv")


@pytest.fixture
def store_in():
    """Makes a store in a directory that the test chooses."""
    return Store


@pytest.fixture
def faulty_io():
    return FaultyIO()
