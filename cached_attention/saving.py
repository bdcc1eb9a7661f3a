"""Pages on their way from the device to host memory."""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import wait
from typing import NamedTuple

from cached_attention import admission
from cached_attention.aliases import Aliases
from cached_attention.chain import PageRun
from cached_attention.hierarchy import Hierarchy
from cached_attention.index import NOWHERE, PageKey
from cached_attention.stats import Direction, StoreStats
from cached_attention.transfer.jobs import PageSave, Transfers
from cached_attention.transfer.streams import Event

logger = logging.getLogger(__name__)

COMPLAINT_SECONDS = 60.0
"""Seconds between two log lines about failed saves."""
CHAIN_SOONER = 1e-6
"""Seconds per page by which earlier pages of a save count as older, so that its first chain is evicted first."""


class _Admitted(NamedTuple):
    """The pages of a run that are to be copied."""

    pages: list[int]
    """Their places in the run."""
    rows: list[int]
    whole: bool = True
    """Whether all pages of the run are in the store now, or will be."""


class Saves:
    """Admits pages to host memory, starts their copies, and reports the outcomes in order.

    Args:
        stats: counts the pages saved, declined and failed.
        page_size: tokens per page.
        clock: seconds since the epoch.
        chain_pages: see `CachedAttentionStore`; a new chain then also begins after a page that is in no tier.
    """

    def __init__(
        self,
        pages: Hierarchy,
        transfers: Transfers,
        aliases: Aliases,
        stats: StoreStats,
        page_size: int,
        clock: Callable[[], float],
        chain_pages: int | None = None,
    ) -> None:
        self._pages = pages
        self._transfers = transfers
        self._aliases = aliases
        self._stats = stats
        self._page_size = page_size
        self._clock = clock
        self._chain_pages = chain_pages
        self._sooner = 0.0 if chain_pages is None else CHAIN_SOONER
        self._running: deque[PageSave] = deque()
        self._finished: deque[bool] = deque()
        self._complain_at = 0.0

    @property
    def in_flight(self) -> int:
        """Number of saves that have not ended."""
        return len(self._running)

    @property
    def pins(self) -> int:
        """Number of pages pinned for saves that have not ended."""
        return sum(len(save.rows) for save in self._running)

    def lacks_parent(self, run: PageRun) -> bool:
        """Whether the page before `run` is in no tier although it must be."""
        return self._chain_pages is None and run.parent is not None and not self._pages.is_kept(run.parent)

    def _begins_chain(self, place: int, parent: PageKey | None) -> bool:
        """Whether the page at `place` of its prompt, after `parent`, starts a chain."""
        if parent is None or self._chain_pages is None:
            return parent is None
        return place % self._chain_pages == 0 or not self._pages.is_kept(parent)

    def start(self, run: PageRun, after: Sequence[Event]) -> None:
        """See `CachedAttentionStore.save`."""
        admitted = self._admit(run)
        slots = [self._pages.in_host.slot[row] for row in admitted.rows]
        landed = self._transfers.save(run, admitted.pages, slots, after)
        self._stats.watch(Direction.SAVE, "host", landed, len)
        self._running.append(PageSave(admitted.rows, admitted.whole, landed))

    def _admit(self, run: PageRun) -> _Admitted:
        """Admit the pages of `run` that are not in the store; stops at a rotated copy, or if no slot is left."""
        admitted = _Admitted([], [])
        if self.lacks_parent(run):
            self._stats.declined += len(run.keys)
            return admitted._replace(whole=False)
        now, parent = self._clock(), run.parent
        known = [key for key in run.keys if self._pages.is_kept(key)]
        admission.make_room(self._pages, len(run.keys) - len(known), known[-1] if known else parent)
        for page, key in enumerate(run.keys):
            row = self._kept(key)
            if row == NOWHERE:
                if (new := self._admit_page(key, run.first_page + page, parent)) is None:
                    self._stats.declined += len(run.keys) - page
                    return admitted._replace(whole=False)
                row = new
                admitted.pages.append(page)
                admitted.rows.append(row)
            self._pages.index.last_use[row] = now - self._sooner * (len(run.keys) - page)
            parent = key
        return admitted

    def _kept(self, key: PageKey) -> int:
        """Row of the page if it is in a tier, or can share the bytes of one that is; else NOWHERE."""
        row = self._pages.index.find(key)
        return row if self._pages.is_kept(key) or (row != NOWHERE and self._pages.join(row)) else NOWHERE

    def _admit_page(self, key: PageKey, place: int, parent: PageKey | None) -> int | None:
        """Row of the page at `place` of its prompt; None if it is a rotated copy, or no slot is left."""
        if self._aliases.is_rotated(key):
            return None
        if self._begins_chain(place, parent):
            place, parent = 0, None
        row = admission.admit(self._pages, key, parent, place * self._page_size)
        if row is not None:
            self._pages.index.uses[row] = 1
        return row

    def poll(self) -> int:
        """Process the saves that have ended; returns the number that wait for `pop`."""
        while self._running and self._running[0].landed.done():
            self._finish(self._running.popleft())
        return len(self._finished)

    def pop(self) -> bool:
        """The outcome of the oldest save that `poll` counted."""
        return self._finished.popleft()

    def wait(self) -> None:
        """Wait until no copy is running; `poll` reports the outcomes."""
        wait([save.landed for save in self._running])

    def _finish(self, save: PageSave) -> None:
        if (error := save.landed.exception()) is None:
            for row, checksum in zip(save.rows, save.landed.result(), strict=True):
                self._pages.index.checksum[row] = checksum
                self._pages.land(row, clean=False)
                self._pages.unpin(row)
            self._stats.saved += len(save.rows)
            self._finished.append(save.whole)
        else:
            self._complain(len(save.rows), error)
            self._give_up(save.rows)
            self._finished.append(False)

    def _complain(self, pages: int, error: BaseException) -> None:
        now = time.monotonic()
        if now >= self._complain_at:
            self._complain_at = now + COMPLAINT_SECONDS
            logger.error("CachedAttention: %d pages could not be copied to host memory.", pages, exc_info=error)

    def _give_up(self, rows: Sequence[int]) -> None:
        """These pages will never land; pages saved after them may now follow a gap."""
        for row in reversed(rows):
            self._pages.give_up(row)
            self._pages.unpin(row)
        self._stats.failed += len(rows)
