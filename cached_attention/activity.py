"""One log line that sums up a store's recent activity. Numbers only, no prompt content."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Self

from cached_attention.stats import Direction, StoreStats
from cached_attention.units import format_size

PERIOD = 60.0
"""Seconds between two lines."""


@dataclass(frozen=True)
class _Counts:
    """Snapshot of the counters that are reported."""

    plain: Counter[str]
    hits: Counter[str]
    gone: Counter[tuple[str, str]]
    moved: Counter[tuple[Direction, str]]
    """Pages."""

    @classmethod
    def of(cls, stats: StoreStats) -> Self:
        plain = {
            "prompts": stats.prompts,
            "tokens": stats.prompt_tokens,
            "given up": stats.given_up,
            "lost": stats.lost,
            "declined": stats.declined,
            "truncated": stats.truncated_prompts,
        }
        moved = {place: flow.pages for place, flow in stats.flows.copy().items()}
        gone = {(tier, str(reason)): pages for (tier, reason), pages in stats.gone.items()}
        return cls(Counter(plain), Counter(stats.hit_tokens), Counter(gone), Counter(moved))

    def since(self, before: Self) -> Self:
        """Increase of each counter since `before`; those that did not grow are left out."""
        return type(self)(
            self.plain - before.plain, self.hits - before.hits, self.gone - before.gone, self.moved - before.moved
        )


class Activity:
    """At most one line per `PERIOD`; none if nothing happened.

    Args:
        page_bytes: size of one page.
        clock: returns seconds.
    """

    def __init__(self, stats: StoreStats, page_bytes: int, clock: Callable[[], float] = time.monotonic) -> None:
        self._stats = stats
        self._page_bytes = page_bytes
        self._clock = clock
        self._before = _Counts.of(stats)
        self._since = clock()

    def poll(self) -> str | None:
        """The next line, if it is due and there is anything to report."""
        seconds = self._clock() - self._since
        if seconds < PERIOD:
            return None
        now = _Counts.of(self._stats)
        new = now.since(self._before)
        self._before, self._since = now, self._clock()
        parts = list(self._parts(new, seconds))
        return f"last {seconds:.0f} s: {'; '.join(parts)}." if parts else None

    def _parts(self, new: _Counts, seconds: float) -> Iterator[str]:
        if tokens := new.plain["tokens"]:
            tiers = ", ".join(f"{tier} {hits / tokens:.0%}" for tier, hits in new.hits.items())
            reused = f"{new.hits.total() / tokens:.0%} reused" + (f" ({tiers})" if tiers else "")
            yield f"prompts {new.plain['prompts']:,}, {tokens:,} tokens, {reused}"
        for (direction, tier), pages in new.moved.items():
            size = pages * self._page_bytes
            what = str(direction) if tier == "host" else f"{direction} {tier}"
            yield f"{what} {format_size(size)} ({format_size(size / seconds)}/s)"
        for tier in sorted({tier for tier, _ in new.gone}, reverse=True):
            reasons = ", ".join(f"{reason} {pages:,}" for (at, reason), pages in new.gone.items() if at == tier)
            yield f"pages that left {tier}: {reasons}"
        if count := new.plain["given up"]:
            yield f"requests that computed rather than wait {count:,}"
        if count := new.plain["declined"]:
            yield f"pages not saved {count:,}"
        if count := new.plain["lost"]:
            yield f"damaged pages {count:,}"
        if count := new.plain["truncated"]:
            yield f"truncated prompts {count:,}"
