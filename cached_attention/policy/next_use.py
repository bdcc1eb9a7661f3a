"""How soon a page will be used again, learnt from past gaps: orders evictions where the queue does not decide."""

from __future__ import annotations

import math
from bisect import bisect_left, bisect_right
from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple
from zlib import crc32

from cached_attention.policy.duel import EVERYTHING, Duel, Sampled

SHORTEST, RATIO, BINS = 2.0, math.sqrt(2), 34
"""Age bins: the first ends at `SHORTEST` seconds, further ends grow by `RATIO` to 1.5 days; the last is open."""
BOUNDS = [0.0, *(SHORTEST * RATIO**k for k in range(BINS - 1)), math.inf]
"""Ages in seconds at which the bins begin, and at which the last one ends."""
USES = (1, 2, 3, 5, 8)
"""Upper bounds of the classes of uses; the last class is open."""
KIND = bytes(bisect_left(USES, uses) for uses in range(257))
"""Class of a page by its number of uses."""
ENDS = len(USES) + 1
"""Added to the class of the last page of a prompt."""
KINDS = 2 * ENDS
PRIOR_USES = 400.0
"""Weight of the prior of a class, in page uses: a few conversations, whose pages return together."""
PRIOR = [0.3] + [0.1] * (BINS - 1)
"""Prior probability of a use in each bin: the worth of a page then falls as one over its age, which is LRU."""
WATCHED = 1 << 15
"""Maximum number of watched pages."""
WIDENING = 3600.0
"""Least seconds between changes of the sample's size before it grows."""
CELLS = 1 << 22
"""Number of use counters, a byte each; pages whose keys map to the same cell share it."""
FORGETTING = 1 << 20
"""Number of uses after which all counts are halved."""
HALF = bytes(count // 2 for count in range(256))


def bin_of(age: float) -> int:
    """Bin of an age in seconds."""
    return max(0, bisect_right(BOUNDS, age) - 1)


@dataclass(slots=True, eq=False)
class _Watch:
    """A sampled page since its last use, wherever its bytes are now."""

    key: bytes
    used: float
    kind: int
    bin: int = 0
    is_over: bool = False


class _Prompt(NamedTuple):
    """The sampled pages of a request that has not run: three objects, however many pages there are."""

    keys: list[bytes]
    kinds: bytearray
    duelled: list[Sampled]
    """The pages that are in the sample of the ghost caches."""


class NextUse:
    """The expected uses of a page per second that it is kept, by its class and age.

    Pages are classified by features that are cheap to know: how often they were used, and whether they end a
    prompt (a last page that is not a whole block, or that the next turn replaces, is not used again). Per class,
    the hazard of a use in each age bin is the fraction of the pages reaching the bin that are used in it. It is
    learnt from a sample of pages that are watched from use to use, in a tier or not, so that evicted pages count
    like kept ones, and pages that never return count from the first bin on. Uses are counted for all pages,
    evicted ones too, in cells by hash (TinyLFU, Einziger et al., ACM ToS 2017). Keys that share a cell are
    overcounted; since a page is used at least as often as its successors, the minimum count in a prompt up to the
    page is a better estimate. The sample consists of the keys whose hash is below a threshold that falls as the
    record fills (SHARDS, Waldspurger et al., FAST 2015, section 3.2) and rises when it empties, so memory is
    bounded and each sampled page represents the same number of pages.

    The worth of a page is the Gittins index of its class and age (Gittins, J. R. Stat. Soc. B 41, 1979): the
    highest ratio, over all times at which to give up, of the probability of a use to the expected seconds kept
    until that use or until giving up. Unlike the current hazard, it accounts for the time that a user takes to
    type; unlike hit density (LHD, Beckmann et al., NSDI 2018, section 4), it does not depend on past evictions.

    A class about which little is known is assumed to be like the mean of all classes, and the mean like `PRIOR`,
    where worth falls with age: a cold start is LRU. The estimates are followed while they do better, see `Duel`.

    Args:
        pages: capacity of the tier; None: the estimates are always followed.
    """

    def __init__(self, pages: int | None = None) -> None:
        self.now = 0.0
        """Time of the last use, in seconds."""
        self._reached = [[0.0] * BINS for _ in range(KINDS)]
        self._used = [[0.0] * BINS for _ in range(KINDS)]
        self._watched: dict[bytes, _Watch] = {}
        self._asked: dict[str, _Prompt] = {}
        """Per request that has not run."""
        self._by_bin: list[deque[_Watch]] = [deque() for _ in range(BINS)]
        self._threshold = EVERYTHING
        self._widen_at = 0.0
        self._counts = bytearray(CELLS)
        self._uses, self._refresh_at, self._halve_at = 0, 64, FORGETTING
        self._next_kind = 0
        self.version = 0
        """Number of changes of `worth`."""
        self._cold = [_gittins(PRIOR)] * KINDS
        self._learnt = self._cold.copy()
        self._duel = None if pages is None else Duel(pages, BOUNDS[:-1])
        self.worth = self._learnt if self._duel is None else self._cold
        """Per class and age bin: expected uses per second kept, from the start of the bin on."""

    def asked(self, request: str, keys: Sequence[bytes], now: float) -> list[int]:
        """A request with the prompt `keys` has arrived; returns the class of each page from now on.

        Must be called once per request, with all pages of its prompt, whether they are in a tier or not.
        """
        self.now = max(self.now, now)
        self._age()
        self._uses += len(keys)
        counts, threshold, end = self._counts, self._threshold, self._end
        duelled = 0 if self._duel is None else self._duel.threshold
        kinds, last, least = [], len(keys) - 1, 256
        prompt = _Prompt([], bytearray(), [])
        for page, key in enumerate(keys):
            hashed = crc32(key)
            cell = hashed % CELLS
            if (uses := counts[cell] + 1) < 256:
                counts[cell] = uses
            if uses < least:
                least = uses
            kind = KIND[least] + (ENDS if page == last else 0)
            kinds.append(kind)
            if hashed < threshold:
                end(key)
                prompt.keys.append(key)
                prompt.kinds.append(kind)
            if hashed < duelled:
                prompt.duelled.append(Sampled(key, kind))
        if prompt.keys or prompt.duelled:
            self._asked[request] = prompt
            self._choose(prompt.duelled)
        return kinds

    def _choose(self, duelled: list[Sampled]) -> None:
        if self._duel is not None and duelled:
            self._duel.asked(duelled)
            worth = self._learnt if self._duel.prefers_learnt else self._cold
            if worth is not self.worth:
                self.worth = worth
                self.version += 1

    def ran(self, request: str, now: float) -> None:
        """`request` runs or was aborted: from now on its pages may be evicted, and are watched."""
        self.now = max(self.now, now)
        if (prompt := self._asked.pop(request, None)) is None:
            return
        watched, reached, youngest, threshold = self._watched, self._reached, self._by_bin[0], self._threshold
        for key, kind in zip(prompt.keys, prompt.kinds, strict=True):
            if key not in watched and crc32(key) < threshold:
                watch = watched[key] = _Watch(key, self.now, kind)
                youngest.append(watch)
                reached[kind][0] += 1
        if self._duel is not None and prompt.duelled:
            self._duel.ran(prompt.duelled, self._learnt, self.now)

    def _end(self, key: bytes) -> None:
        if (known := self._watched.pop(key, None)) is not None:
            self._used[known.kind][known.bin] += 1
            known.is_over = True

    def kinds(self, keys: Iterable[bytes], before: int | None = None) -> list[int]:
        """Classes of consecutive pages that enter a tier. Counts no uses: for prompts, `asked` has done so.

        `before`: class of the page before them; None if there is none.
        """
        counts, least = self._counts, ENDS if before is None else before % ENDS
        return [least := min(least, KIND[counts[crc32(key) % CELLS]]) for key in keys]

    def _age(self) -> None:
        for bin, queue in enumerate(self._by_bin[:-1]):
            limit = self.now - BOUNDS[bin + 1]
            while queue and (queue[0].is_over or queue[0].used <= limit):
                watch = queue.popleft()
                if watch.is_over:
                    continue
                watch.bin += 1
                self._reached[watch.kind][watch.bin] += 1
                if watch.bin < BINS - 1:
                    self._by_bin[watch.bin].append(watch)
                else:
                    del self._watched[watch.key]  # Else what never returns would fill the record.
        if len(self._watched) > WATCHED:
            self._thin_out()
        elif len(self._watched) < WATCHED // 4 and self._threshold < EVERYTHING and self.now >= self._widen_at:
            self._widen()
        if self._uses >= self._halve_at:
            self._forget_half()
        if self._uses >= self._refresh_at:
            self._refresh_at = self._uses + max(64, min(1 << 13, self._uses // 8)) // KINDS
            self._learn()

    def _thin_out(self) -> None:
        """Halve the sample; walks all watched pages, once per `WATCHED` / 2 new ones."""
        self._threshold //= 2
        self._weigh(1 / 2)
        self._widen_at = self.now + WIDENING
        for key in [key for key in self._watched if crc32(key) >= self._threshold]:
            self._watched.pop(key).is_over = True
        for bin, queue in enumerate(self._by_bin):
            self._by_bin[bin] = deque(watch for watch in queue if not watch.is_over)

    def _widen(self) -> None:
        """Double the sample: fewer pages are in use than when it was thinned out."""
        self._widen_at = self.now + WIDENING
        self._threshold *= 2
        self._weigh(2)

    def _weigh(self, factor: float) -> None:
        for counts in (*self._reached, *self._used):
            counts[:] = [count * factor for count in counts]

    def _forget_half(self) -> None:
        self._halve_at = self._uses + FORGETTING
        self._weigh(1 / 2)
        self._counts = self._counts.translate(HALF)

    def _learn(self) -> None:
        """Estimate the worth of one class again, in rotation, so that no pass bears the cost of all."""
        kind, self._next_kind = self._next_kind, (self._next_kind + 1) % KINDS
        weight = PRIOR_USES * self._threshold / EVERYTHING
        reached = [sum(column) for column in zip(*self._reached, strict=True)]
        used = [sum(column) for column in zip(*self._used, strict=True)]
        mean = _hazard(used, reached, PRIOR, weight)
        self._learnt[kind] = _gittins(_hazard(self._used[kind], self._reached[kind], mean, weight))
        self.version += 1


def _hazard(used: list[float], reached: list[float], prior: list[float], weight: float) -> list[float]:
    return [min(1.0, (u + weight * p) / (r + weight)) for u, r, p in zip(used, reached, prior, strict=True)]


def _gittins(hazard: list[float]) -> list[float]:
    """Per bin: the highest ratio of expected uses to expected seconds, over all bins after which to give up."""
    worth = []
    for first in range(BINS - 1):
        left, uses, seconds, best = 1.0, 0.0, 0.0, 0.0
        for bin in range(first, BINS - 1):
            uses += left * hazard[bin]
            seconds += left * (1 - hazard[bin] / 2) * (BOUNDS[bin + 1] - BOUNDS[bin])
            left *= 1 - hazard[bin]
            best = max(best, uses / seconds)
        worth.append(best)
    return [*worth, worth[-1] / 2]
