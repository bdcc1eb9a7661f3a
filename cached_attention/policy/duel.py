"""Whether the learnt eviction order beats LRU on this workload, decided by the hits of two ghost caches."""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Iterable, Sequence
from typing import NamedTuple

GHOSTS = 1024
"""Maximum number of keys in a ghost cache; for a larger tier they are a sample."""
EVERYTHING = 1 << 32
"""Upper bound of the hashes; a sample consists of the keys whose hash is below a fraction of it."""
CANDIDATES = 16
"""Number of keys from which a ghost cache evicts the one of least worth."""
CERTAIN = 2.0
"""Standard deviations by which the learnt order must lead before it is followed."""
REMEMBERED = 512
"""Number of recent requests that count, roughly, of those for which one order did better."""


class Sampled(NamedTuple):
    """A sampled page that a request needs."""

    key: bytes
    kind: int


class GhostCache:
    """The keys that a tier would hold under one eviction order, without their bytes.

    The victim is the worst of a few keys spread evenly over the cache, different ones each time: this needs no
    sorted queue, and differs little from the exact order (as in Redis, and LHD, Beckmann et al., NSDI 2018,
    section 5).

    Args:
        bounds: ages at which the columns of a table of worth begin, in seconds.
    """

    def __init__(self, bounds: Sequence[float]) -> None:
        self._bounds = bounds
        self._places: dict[bytes, int] = {}
        self._pages: list[Sampled] = []
        self._used: list[float] = []
        self._turn = 0

    def __len__(self) -> int:
        return len(self._pages)

    def __contains__(self, key: bytes) -> bool:
        return key in self._places

    def put(self, page: Sampled, now: float) -> None:
        """The page is in the cache, and was used now."""
        place = self._places.setdefault(page.key, len(self._pages))
        if place == len(self._pages):
            self._pages.append(page)
            self._used.append(now)
        else:
            self._pages[place], self._used[place] = page, now

    def shrink(self, size: int, worth: Sequence[Sequence[float]] | None, now: float) -> None:
        """Evict until `size` keys are left: least `worth` (per class and age) first; if None, coldest first."""
        while len(self._pages) > size:
            self._turn += 1
            stride = max(1, len(self._pages) // CANDIDATES)
            candidates = range(self._turn % stride, len(self._pages), stride)
            if worth is None:
                victim = min(candidates, key=self._used.__getitem__)
            else:
                victim = min(candidates, key=lambda place: self._worth(place, worth, now))
            self._remove(victim)

    def _worth(self, place: int, worth: Sequence[Sequence[float]], now: float) -> tuple[float, float]:
        used = self._used[place]
        age = max(0, bisect_right(self._bounds, now - used) - 1)
        return worth[self._pages[place].kind][age], used

    def _remove(self, place: int) -> None:
        del self._places[self._pages[place].key]
        page, used = self._pages.pop(), self._used.pop()
        if place < len(self._pages):
            self._pages[place], self._used[place], self._places[page.key] = page, used, place


class Duel:
    """Runs LRU and the learnt order side by side on a sample of the pages, and follows the one with more hits.

    Each order has a ghost cache, smaller than the tier in the ratio of the sample to all pages (SHARDS,
    Waldspurger et al., FAST 2015; miniature simulations, Waldspurger et al., ATC 2017). Choosing between two
    policies by counting where they differ is from set duelling (Qureshi et al., ISCA 2007). LRU is followed until
    the learnt order leads by more than chance, and again as soon as it no longer leads. So if there is nothing to
    learn, or the estimates mislead, eviction is LRU, except for the time it takes to notice.

    The queue is ignored: pages of queued requests are kept in any case, whichever order is followed.

    Args:
        pages: capacity of the tier.
        bounds: see `GhostCache`.
    """

    def __init__(self, pages: int, bounds: Sequence[float]) -> None:
        self._pages = pages
        self.threshold = min(EVERYTHING, EVERYTHING * GHOSTS // max(1, pages))
        """Only pages whose hash is below it are in the ghost caches."""
        self.lru, self.learnt = GhostCache(bounds), GhostCache(bounds)
        self.prefers_learnt = False
        self._lead, self._spread = 0.0, 0.0

    @property
    def size(self) -> int:
        """Maximum number of keys in each ghost cache."""
        return max(1, self._pages * self.threshold // EVERYTHING)

    def asked(self, pages: Iterable[Sampled]) -> None:
        """A request that needs `pages` has arrived; counts which ghost cache holds more of them."""
        lead = 0
        for page in pages:
            lead += (page.key in self.learnt) - (page.key in self.lru)
        if not lead:
            return
        kept = 1 - 1 / REMEMBERED
        self._lead, self._spread = self._lead * kept + lead, self._spread * kept + lead * lead
        if self._lead <= 0:
            self.prefers_learnt = False
        elif self._lead > CERTAIN * math.sqrt(self._spread):
            self.prefers_learnt = True

    def ran(self, pages: Iterable[Sampled], worth: Sequence[Sequence[float]], now: float) -> None:
        """The request ran: `pages` are in the tier. `worth`: the learnt estimates, per class and age."""
        for page in pages:
            self.lru.put(page, now)
            self.learnt.put(page, now)
        self.lru.shrink(self.size, None, now)
        self.learnt.shrink(self.size, worth, now)
