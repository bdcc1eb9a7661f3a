"""Operations per second of the index, with a given number of pages in it."""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial

from cached_attention import admission
from cached_attention.hierarchy import Hierarchy
from cached_attention.layout import PageLayout
from cached_attention.tiers.host import HostTier

CHAIN = 32
"""Pages per conversation."""
_LAYOUT = PageLayout(1, ((4096,),))


@dataclass(frozen=True)
class IndexSpeed:
    operation: str
    pages: int
    """Pages in the index."""
    per_second: float


def measure_index(pages: int, operations: int, rounds: int) -> list[IndexSpeed]:
    """Medians over `rounds`; every operation is done on `operations` pages, of chains of `CHAIN` pages.

    place: a page gets a slot in host memory and is saved there. find: look up whether it is there. touch: record
    another use. evict: the next page in eviction order leaves.
    """
    # `operations` more slots than pages, for those that are placed and evicted in addition.
    hierarchy = Hierarchy(HostTier(_LAYOUT, (pages + operations) * _LAYOUT.stride), has_disk=False)
    source = random.Random(0)
    keys = [source.randbytes(32) for _ in range(pages)]
    _place(hierarchy, keys)
    seconds: dict[str, list[float]] = {"place": [], "find": [], "touch": [], "evict": []}
    for number in range(rounds):
        new = [source.randbytes(32) for _ in range(operations)]
        known = source.choices(keys, k=operations)
        rows = list(map(hierarchy.index.find, known))
        now = float(number + 1)
        seconds["place"].append(_timed(partial(_place, hierarchy, new)))
        seconds["find"].append(_timed(partial(_find, hierarchy, known)))
        seconds["touch"].append(_timed(partial(_touch, hierarchy, rows, now)))
        seconds["evict"].append(_timed(partial(_evict, hierarchy, operations)))
        keys = [key for key in hierarchy.index.keys if key is not None]
    return [
        IndexSpeed(name, pages, operations / sorted(times)[len(times) // 2]) for name, times in seconds.items()
    ]


def _timed(work: Callable[[], None]) -> float:
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


def _place(hierarchy: Hierarchy, keys: Sequence[bytes]) -> None:
    parent = None
    for place, key in enumerate(keys):
        parent = parent if place % CHAIN else None
        row = admission.admit(hierarchy, key, parent, place % CHAIN)
        assert row is not None
        hierarchy.land(row, clean=True)
        hierarchy.unpin(row)
        parent = key


def _find(hierarchy: Hierarchy, keys: Iterable[bytes]) -> None:
    for key in keys:
        assert hierarchy.loadable([key], 0)


def _touch(hierarchy: Hierarchy, rows: Iterable[int], now: float) -> None:
    index = hierarchy.index
    for row in rows:
        index.uses[row] += 1
        index.last_use[row] = now


def _evict(hierarchy: Hierarchy, count: int) -> None:
    assert admission.expire(hierarchy, count, float("inf")) == count
