"""How long it takes a server to open a disk store of many pages, and how much memory.

    python -m benchmark.opening DIRECTORY PAGES [encrypted]    # opens what `make_store` made, prints JSON

Each record is one small page, and was never written: the slot files are sparse.
"""

from __future__ import annotations

import json
import random
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path

import psutil
import torch
from tqdm import tqdm

from cached_attention.encryption import EncryptionKey
from cached_attention.fingerprint import Fingerprint
from cached_attention.layout import DevicePool
from cached_attention.store import CachedAttentionStore
from cached_attention.tiers.disk import DiskTier
from cached_attention.tiers.disk_directory import INDEX_NAME
from cached_attention.tiers.disk_files import FileIO, file_name
from cached_attention.tiers.disk_format import store_format
from cached_attention.tiers.disk_index import Changes, DiskIndex
from cached_attention.tiers.disk_rows import DiskRecord
from cached_attention.tiers.disk_space import TRANSACTION_ROWS, Space

CHAIN = 32
"""Pages per conversation: 2,048 tokens in pages of 64."""
_PAGE_BYTES = 4096
_KEY = EncryptionKey(bytes(range(32)))
_RESET_PEAK = "5"


@dataclass(frozen=True)
class Opening:
    """Measurements of one process that opened a store."""

    pages: int
    tier_s: float
    """Until the disk tier was open."""
    store_s: float
    """From then until the store knew every page."""
    peak_bytes: int
    """Peak resident memory meanwhile, above the level before."""
    encrypted: bool = False

    @property
    def seconds(self) -> float:
        return self.tier_s + self.store_s

    @property
    def bytes_per_page(self) -> float:
        return self.peak_bytes / self.pages


def make_store(directory: Path, pages: int, chain: int = CHAIN, *, encrypted: bool = False) -> None:
    """Create a store of `pages` pages in conversations of `chain` pages, in the order of saving."""
    tier = _open_tier(directory, pages, encrypted)
    tier.close()
    fingerprint = _fingerprint().encrypted(_KEY.id) if encrypted else _fingerprint()
    rows = store_format(fingerprint, _KEY).rows
    space = Space.within(tier.capacity_bytes, tier.stride, row_bytes=rows.most_bytes)
    index = DiskIndex(tier.path / INDEX_NAME, {"fingerprint": fingerprint.digest()}, FileIO(), rows)
    index.limit(space)
    bar = tqdm(total=pages, desc=f"a store of {pages:,} pages", unit="page", leave=False)
    records = _records(pages, chain)
    while some := list(islice(records, TRANSACTION_ROWS)):
        index.apply(Changes(saved=some))
        bar.update(len(some))
    bar.close()
    index.close()
    for number, first in enumerate(range(0, pages, space.slots_per_file)):
        with open(tier.path / file_name(number), "wb") as file:
            file.truncate(min(space.slots_per_file, pages - first) * tier.stride)


def measure(directory: Path, pages: int, encrypted: bool = False) -> Opening:
    """Open the store in a separate process.

    Raises:
        subprocess.CalledProcessError: it failed.
    """
    command = [sys.executable, "-m", "benchmark.opening", str(directory), str(pages), *["encrypted"] * encrypted]
    reply = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    return Opening(**json.loads(reply.stdout))


def open_here(directory: Path, pages: int, encrypted: bool = False) -> Opening:
    pool = DevicePool([[torch.empty(4, _PAGE_BYTES // 2, dtype=torch.uint8) for _ in "KV"]], page_size=1)
    CachedAttentionStore(pool, _PAGE_BYTES).close()  # First-use costs do not depend on pages.
    before = psutil.Process().memory_info().rss
    Path("/proc/self/clear_refs").write_text(_RESET_PEAK)
    started = time.perf_counter()
    tier = _open_tier(directory, pages, encrypted)
    opened = time.perf_counter()
    store = CachedAttentionStore(pool, _PAGE_BYTES, tier)
    ended = time.perf_counter()
    peak = _peak_bytes()
    found = store.counters()["disk_pages_used"]
    store.close()
    if found != pages:
        raise ValueError(f"{directory} has {found:,} pages; {pages:,} were to be opened.")
    return Opening(pages, opened - started, ended - opened, peak - before, encrypted)


def _peak_bytes() -> int:
    lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(lines["VmHWM"].split()[0]) * 1024


def _fingerprint() -> Fingerprint:
    return Fingerprint("benchmark", "none", "bytes", 1, ((_PAGE_BYTES // 2,) * 2,), {}, {})


def _open_tier(directory: Path, pages: int, encrypted: bool) -> DiskTier:
    capacity = (1 << 30) + pages * 3 * _PAGE_BYTES
    return DiskTier(directory, _fingerprint(), capacity, encryption=_KEY if encrypted else None)


def _records(pages: int, chain: int) -> Iterator[DiskRecord]:
    source = random.Random(0)
    now, key = time.time(), None
    for slot in range(pages):
        parent = key if slot % chain else None
        key = source.randbytes(32)
        used = now - (pages - slot) // chain * 1e-3
        yield DiskRecord(key, slot, parent, slot % chain, source.getrandbits(64), used, 1)


if __name__ == "__main__":
    print(json.dumps(asdict(open_here(Path(sys.argv[1]), int(sys.argv[2]), "encrypted" in sys.argv[3:]))))
