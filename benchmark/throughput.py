"""Throughput of a tier's own classes, measured alternately with moving the same bytes without them."""

from __future__ import annotations

import os
import shutil
import statistics
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from cached_attention.checksum import page_checksum
from cached_attention.encryption import EncryptionKey
from cached_attention.fingerprint import Fingerprint
from cached_attention.layout import DevicePool, PageLayout
from cached_attention.migration.disk_write_behind import BATCH_PAGES, URGENT_BATCHES
from cached_attention.tiers.disk import DiskTier
from cached_attention.tiers.disk_runs import RUN_BYTES
from cached_attention.tiers.host import HostTier
from cached_attention.tiers.page_io import PageRead, PageWrite, ReadOutcome
from cached_attention.transfer.copier import page_copier

IO_THREADS = 4
"""Write threads of the disk tier (its default); reads have one more."""


@dataclass(frozen=True)
class ModelShape:
    """Model dimensions that determine the bytes of a token."""

    layers: int = 32
    kv_heads: int = 8
    head_dim: int = 128
    dtype_bytes: int = 2

    @property
    def component_bytes(self) -> int:
        """Bytes of one token's keys, or values, in one layer."""
        return self.kv_heads * self.head_dim * self.dtype_bytes

    @property
    def token_bytes(self) -> int:
        return 2 * self.layers * self.component_bytes

    def __str__(self) -> str:
        return (
            f"{self.layers} layers, {self.kv_heads} KV heads of {self.head_dim}, {self.dtype_bytes} bytes each: "
            f"{self.token_bytes:,} bytes per token"
        )


@dataclass(frozen=True)
class Comparison:
    """Seconds for the same bytes, ours and raw, round by round."""

    tier: str
    direction: str
    page_tokens: int
    page_bytes: int
    moved_bytes: int
    """Bytes moved in each round."""
    ours_s: list[float] = field(default_factory=list)
    raw_s: list[float] = field(default_factory=list)

    @property
    def ratios(self) -> list[float]:
        """Ratios of our throughput to the raw one, within each round."""
        return [raw / ours for ours, raw in zip(self.ours_s, self.raw_s, strict=True)]

    @property
    def ratio(self) -> float:
        return statistics.median(self.ratios)

    @property
    def ours_bytes_per_s(self) -> float:
        return self.moved_bytes / statistics.median(self.ours_s)

    @property
    def raw_bytes_per_s(self) -> float:
        return self.moved_bytes / statistics.median(self.raw_s)


class Contest(NamedTuple):
    """Two ways to move the same bytes in one direction: ours, and the raw one."""

    ours: Callable[[], None]
    raw: Callable[[], None]
    before_ours: Callable[[], None] = lambda: None
    """Preparation, not timed."""
    before_raw: Callable[[], None] = lambda: None

    def run(self, comparison: Comparison, rounds: int) -> Iterator[None]:
        """Time both sides, with alternating order, after an unrecorded warm-up round; yields per round."""
        for number in range(-1, rounds):
            seconds = {}
            sides = {"ours": (self.before_ours, self.ours), "raw": (self.before_raw, self.raw)}
            for side in sorted(sides, reverse=bool(number % 2)):
                before, move = sides[side]
                before()
                started = time.perf_counter()
                move()
                seconds[side] = time.perf_counter() - started
            if number >= 0:
                comparison.ours_s.append(seconds["ours"])
                comparison.raw_s.append(seconds["raw"])
            yield


class HostBench:
    """A device pool in ordinary memory, an arena of the same size, and the copier between them.

    The raw side is one memcpy of the whole, between the same memory, in order.

    Args:
        size: bytes; larger than the CPU's caches.
    """

    def __init__(self, shape: ModelShape, page_tokens: int, size: int) -> None:
        self.page_bytes = shape.token_bytes * page_tokens
        pages = size // self.page_bytes
        self.moved_bytes = pages * self.page_bytes
        memory = torch.empty(self.moved_bytes, dtype=torch.uint8)
        memory.numpy()[:] = np.random.default_rng(0).integers(0, 256, self.moved_bytes, np.uint8)
        parts = memory.view(shape.layers, 2, pages * page_tokens, shape.component_bytes)
        device = DevicePool([list(layer) for layer in parts], page_tokens)
        host = HostTier(device.layout, self.moved_bytes)
        host.arena.zero_()
        self._copier = page_copier(device, host)
        self._layers = shape.layers
        self._memory, self._arena = memory.numpy(), host.arena.view(-1).numpy()
        places = np.random.default_rng(1)
        self._pages, self._slots = (places.permutation(pages).tolist() for _ in range(2))

    def contests(self) -> dict[str, Contest]:
        return {
            "save": Contest(self._save, lambda: np.copyto(self._arena, self._memory)),
            "load": Contest(self._load, lambda: np.copyto(self._memory, self._arena)),
        }

    def _save(self) -> None:
        self._copier.save(self._pages, self._slots)

    def _load(self) -> None:
        moves = self._copier.moves(torch.tensor(self._pages), self._slots)
        for layer in range(self._layers):
            self._copier.load(layer, moves)


class DiskBench:
    """A disk tier and, beside it, a file of the same size on the same file system.

    `fill` writes to preallocated space that was never written, `write` to space that was, and `read` reads in the
    order of the slots. The raw side moves the same bytes from the same memory with calls of the same size from as
    many threads, and calls fdatasync as long as writes come in and once at the end, like the tier. It keeps no
    index. The tier allocates its space while it fills it; the raw file has it from the start.

    Args:
        directory: created, and removed by `close`.
        size: bytes; the directory takes about twice as many, and some more for the index.
        encryption: key of the tier's store.
    """

    def __init__(
        self,
        directory: Path,
        shape: ModelShape,
        page_tokens: int,
        size: int,
        encryption: EncryptionKey | None = None,
    ) -> None:
        self._encryption = encryption
        layers = ((shape.component_bytes * page_tokens,) * 2,) * shape.layers
        self._fingerprint = Fingerprint("benchmark", "none", "bytes", page_tokens, layers, {}, {})
        self.page_bytes = self._fingerprint.page_bytes
        count = size // self.page_bytes
        self.moved_bytes = count * self.page_bytes
        self._directory = directory
        self._capacity = self.moved_bytes + (1 << 28)
        self._memory = HostTier(PageLayout(page_tokens, layers), self.moved_bytes)
        noise = np.random.default_rng(0)
        for slot in range(count):
            self._memory.arena[slot] = torch.from_numpy(
                noise.integers(0, 256, self._memory.layout.stride, np.uint8)
            )
        self._writes = [self._page_write(number) for number in range(count)]
        self._saved: list[int] = []
        self._tier = self._open()
        self.direct = self._tier.direct
        self._raw = RawFile(directory / "raw.bin", self.moved_bytes, self.direct)

    def close(self) -> None:
        self._tier.close()
        self._raw.close()
        shutil.rmtree(self._directory)

    def contests(self) -> dict[str, Contest]:
        run = max(1, RUN_BYTES // self.page_bytes)
        buffers = [page.buffer for page in self._writes]
        calls = [buffers[first : first + run] for first in range(0, len(buffers), run)]

        def write() -> None:
            self._raw.write(calls, IO_THREADS)

        return {
            "fill": Contest(self._write, write, self._start_empty, self._raw.make),
            "write": Contest(self._write, write, self._forget),
            "read": Contest(self._read, lambda: self._raw.read(calls, IO_THREADS + 1)),
        }

    def _open(self) -> DiskTier:
        return DiskTier(
            self._directory / "store",
            self._fingerprint,
            self._capacity,
            encryption=self._encryption,
        )

    def _start_empty(self) -> None:
        """Start with an empty store: it frees its space when it is closed without pages."""
        self._forget()
        self._tier.close()
        self._tier = self._open()

    def _page_write(self, number: int) -> PageWrite:
        key, parent = (place.to_bytes(32, "big") for place in (number + 1, number))
        checksum = page_checksum(key, self._memory.record(number))
        return PageWrite(key, parent, 0, checksum, time.time(), 1, self._memory.slot_bytes(number))

    def _forget(self) -> None:
        self._tier.remove(self._saved)
        assert self._tier.flush(60)
        self._saved = []

    def _write(self) -> None:
        """Write like write-behind does when host memory is short."""
        waiting: deque[Future[list[int | None]]] = deque()
        first = 0
        while first < len(self._writes):
            count = min(BATCH_PAGES, self._tier.write_room)
            if count == 0 or len(waiting) == URGENT_BATCHES:
                self._note(waiting.popleft())
                continue
            waiting.append(self._tier.write(self._writes[first : first + count]))
            first += count
        while waiting:
            self._note(waiting.popleft())

    def _note(self, written: Future[list[int | None]]) -> None:
        slots = [slot for slot in written.result() if slot is not None]
        if len(slots) < len(written.result()):
            raise OSError("the disk tier declined pages: is the disk full?")
        self._saved += slots

    def _read(self) -> None:
        reads = [
            PageRead(page.key, slot, page.checksum, page.buffer)
            for page, slot in zip(self._writes, self._saved, strict=True)
        ]
        if set(self._tier.read(reads).result()) != {ReadOutcome.READ}:
            raise OSError("the disk tier lost pages")


class EncryptionBench:
    """A disk tier that encrypts, and beside it one that does not, on the same file system.

    Args:
        directory: created, and removed by `close`.
        size: bytes; memory takes twice as many, the directory four times.
    """

    def __init__(self, directory: Path, shape: ModelShape, page_tokens: int, size: int) -> None:
        self._directory = directory
        key = EncryptionKey(os.urandom(32))
        self._sealed = DiskBench(directory / "sealed", shape, page_tokens, size, key)
        self._plain = DiskBench(directory / "plain", shape, page_tokens, size)
        self.page_bytes, self.moved_bytes = self._plain.page_bytes, self._plain.moved_bytes
        self.direct = self._plain.direct

    def close(self) -> None:
        self._sealed.close()
        self._plain.close()

    def contests(self) -> dict[str, Contest]:
        sealed, plain = self._sealed.contests(), self._plain.contests()
        return {
            name: Contest(sealed[name].ours, plain[name].ours, sealed[name].before_ours, plain[name].before_ours)
            for name in sealed
        }


class RawFile:
    """A preallocated file, read and written with plain calls."""

    def __init__(self, path: Path, size: int, direct: bool) -> None:
        self._path, self._size, self._direct = path, size, direct
        self._fd = -1
        self.make()

    def make(self) -> None:
        """Create the file anew; nothing is written to it."""
        self.close()
        flags = os.O_RDWR | os.O_CREAT | (os.O_DIRECT if self._direct else 0)
        self._fd = os.open(self._path, flags, 0o600)
        os.posix_fallocate(self._fd, 0, self._size)
        os.fsync(self._fd)

    def close(self) -> None:
        if self._fd >= 0:
            os.close(self._fd)
            self._path.unlink()
            self._fd = -1

    def write(self, calls: Sequence[Sequence[memoryview]], threads: int) -> None:
        """Durable on return."""
        with self._syncing() as written:
            self._move(os.pwritev, calls, threads, written.set)
        os.fdatasync(self._fd)

    def read(self, calls: Sequence[Sequence[memoryview]], threads: int) -> None:
        self._move(os.preadv, calls, threads, lambda: None)

    def _move(
        self,
        move: Callable[[int, Sequence[memoryview], int], int],
        calls: Sequence[Sequence[memoryview]],
        threads: int,
        moved: Callable[[], None],
    ) -> None:
        offsets = [0]
        for buffers in calls:
            offsets.append(offsets[-1] + sum(buffer.nbytes for buffer in buffers))

        def one(number: int) -> None:
            expected = offsets[number + 1] - offsets[number]
            if move(self._fd, calls[number], offsets[number]) != expected:
                raise OSError(f"a call for {expected} bytes moved less")
            moved()

        with ThreadPoolExecutor(threads) as pool:
            for _ in pool.map(one, range(len(calls))):
                pass

    @contextmanager
    def _syncing(self) -> Iterator[threading.Event]:
        """Call fdatasync, on a separate thread, whenever the event was set since the previous call."""
        written, ended = threading.Event(), threading.Event()

        def sync() -> None:
            while written.wait() and not ended.is_set():
                written.clear()
                os.fdatasync(self._fd)

        thread = threading.Thread(target=sync)
        thread.start()
        try:
            yield written
        finally:
            ended.set()
            written.set()
            thread.join()
