"""Shrinks the stores of a directory while no server owns it."""

from __future__ import annotations

import mmap
from collections.abc import Iterator
from contextlib import ExitStack, closing
from pathlib import Path
from typing import NamedTuple

import numpy as np

from cached_attention.tiers.disk_directory import (
    FINGERPRINT_NAME,
    INDEX_NAME,
    DirectoryLock,
    last_change,
    read_fingerprint,
    remove_store,
)
from cached_attention.tiers.disk_files import FileIO, SlotFiles
from cached_attention.tiers.disk_index import INDEX_ERRORS, Changes, DiskIndex, is_damage
from cached_attention.tiers.disk_ranks import FoundStores, find_stores
from cached_attention.tiers.disk_reader import StoreReader
from cached_attention.tiers.disk_space import Space, disk_usage

_BATCH = 64
"""Records moved per commit."""


class Pruned(NamedTuple):
    """Result for one store."""

    store: Path
    dropped: int
    """Pages."""
    kept: int
    freed: int
    """Bytes of file system blocks."""
    note: str


def prune(directory: Path, before: float | None = None, size: int | None = None) -> Iterator[Pruned]:
    """Drop pages last used before `before` (seconds since the epoch), then the coldest pages until everything
    that `find_stores` finds takes at most `size` bytes, and free their space. Prunes one store per iteration.

    All stores share one cutoff time: ranks of one server, which use a page at about the same time, keep about the
    same pages. A store whose index is damaged has no pages that could be used: it is removed, with `before` alone
    only if it was last written to before that. One of another version of this program, or with a damaged
    fingerprint, is left unchanged.

    Raises:
        NoStoresError: the directory holds no stores.
        DirectoryInUseError: a server owns one of the directories; nothing was dropped.
        OSError, sqlite3.Error: the directory cannot be used.
    """
    found = find_stores(directory)
    with ExitStack() as locks:
        for rank in found.ranks:
            locks.callback(DirectoryLock(rank.directory).release)
        cutoff = float("-inf") if before is None else before
        if size is not None:
            cutoff = max(cutoff, _cutoff(found, size))
        for store in found.stores:
            yield _prune_store(store, cutoff, keep_fresh=size is None)


def _cutoff(found: FoundStores, size: int) -> float:
    """Earliest last use of pages that may stay, so that all of it takes at most `size` bytes with indexes."""
    # Before the indexes are opened, which creates temporary files.
    rest = found.usage - sum(disk_usage(path) for store in found.stores for path in store.glob("pages-*.bin"))
    uses, costs = [np.empty(0)], [np.empty(0, np.int64)]
    for store in found.stores:
        try:
            with closing(StoreReader(store)) as reader:
                last_uses = np.fromiter(reader.last_uses(), np.float64)
        except (ValueError, *INDEX_ERRORS):
            continue
        uses.append(last_uses)
        costs.append(np.full(len(last_uses), reader.format.stride, np.int64))
    every, cost = np.concatenate(uses), np.concatenate(costs)
    order = np.argsort(-every, kind="stable")
    fits = np.cumsum(cost[order]) <= size - rest
    if fits.all():
        return float("-inf")
    # Pages of the same age as the first that does not fit are dropped as well.
    return float(np.nextafter(every[order[int(fits.argmin())]], np.inf))


def _prune_store(store: Path, cutoff: float, keep_fresh: bool) -> Pruned:
    before, changed = disk_usage(store), last_change(store)
    fingerprint = read_fingerprint(store)
    if fingerprint is None:
        return Pruned(store, 0, 0, 0, f"left alone: {FINGERPRINT_NAME} is of another version, or damaged")
    try:
        with closing(StoreReader(store)) as reader:
            rows, stride, per_file = reader.format.rows, reader.format.stride, reader.slots_per_file
    except INDEX_ERRORS as error:
        if not is_damage(error):
            raise
        if keep_fresh and changed >= cutoff:
            return Pruned(store, 0, 0, 0, "left alone: its index is damaged, and its files are not that old")
        return Pruned(store, 0, 0, remove_store(store), "removed: its index is damaged")
    index = DiskIndex(store / INDEX_NAME, {"fingerprint": fingerprint.digest()}, FileIO(), rows)
    try:
        kept, dropped = _shrink(store, index, stride, per_file, cutoff)
    finally:
        index.close()
    if kept == 0:
        remove_store(store)
    return Pruned(store, dropped, kept, before - disk_usage(store), "" if kept else "removed")


def _shrink(store: Path, index: DiskIndex, stride: int, per_file: int, cutoff: float) -> tuple[int, int]:
    """Number of pages kept and dropped."""
    end = max(index.slots(), default=-1) + 1
    index.limit(Space(stride, end, per_file, index.rows.most_bytes))
    dropped = index.drop("last_use < ?", cutoff)
    used = sorted(index.slots())
    files = SlotFiles(store, stride, end, per_file, FileIO())
    try:
        holes = sorted(set(range(len(used))).difference(used))
        _move(index, files, dict(zip(used[len(used) - len(holes) :], holes, strict=True)))
        files.cut(len(used))
    finally:
        files.close()
    return len(used), dropped


def _move(index: DiskIndex, files: SlotFiles, moves: dict[int, int]) -> None:
    """Copy records unchanged to free slots, bytes before rows, so that after a crash each page is intact in one
    place. Needs no key.
    """
    arena = memoryview(mmap.mmap(-1, _BATCH * files.stride))
    buffers = [arena[start : start + files.stride] for start in range(0, len(arena), files.stride)]
    changes = Changes()
    for row in index.every_row():
        slot, *_ = row
        if slot not in moves or (moved := index.rows.moved(row, moves[slot])) is None:
            continue
        files.read(slot, buffers[:1])
        files.write(moves[slot], buffers[:1])
        changes.moved.append(moved)
        changes.removed.append(slot)
        if len(changes.moved) == _BATCH:
            _commit(index, files, changes)
            changes = Changes()
    _commit(index, files, changes)


def _commit(index: DiskIndex, files: SlotFiles, changes: Changes) -> None:
    files.sync(slot for slot, *_ in changes.moved)
    index.apply(changes)
