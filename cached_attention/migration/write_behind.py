"""Write-behind: pages on their way from host memory to a tier below it."""

from __future__ import annotations

import logging
import time
from abc import ABC, abstractmethod
from collections import deque
from concurrent.futures import Future

from cached_attention.hierarchy import Hierarchy
from cached_attention.index import NOWHERE
from cached_attention.stats import Direction
from cached_attention.tiers.page_io import PageWrite
from cached_attention.tiers.sources import PageSink

logger = logging.getLogger(__name__)

FLUSH_REPORT = 2.0
"""Seconds between log lines of a long flush."""


class WriteBehind(ABC):
    """Copies pages to a tier in batches. All calls come from one thread; `poll` never waits.

    Pages are pinned from when they are chosen until the tier has answered.
    """

    name: str
    """Of the tier."""

    def __init__(self, pages: Hierarchy, tier: PageSink) -> None:
        self._pages = pages
        self._tier = tier
        self._batches: deque[tuple[list[int], Future[list[int | None]]]] = deque()
        """Rows, and the tier's answer for each of them; oldest first."""

    @abstractmethod
    def poll(self) -> None:
        """Process writes that have ended, and start more."""

    @abstractmethod
    def _written(self, row: int, slot: int | None) -> None:
        """The tier has answered for a page; None: it did not take the page."""

    @property
    @abstractmethod
    def left(self) -> int:
        """Number of pages that are still to be written."""

    @property
    @abstractmethod
    def _goes_on(self) -> bool:
        """Whether a flush can expect that more pages will be written."""

    @property
    def rows_in_flight(self) -> int:
        return sum(len(rows) for rows, _ in self._batches)

    @property
    def futures(self) -> list[Future[list[int | None]]]:
        """Of all writes that have not been processed."""
        return [answer for _, answer in self._batches]

    def _write(self, rows: list[int]) -> None:
        """Hand the pinned `rows` to the tier."""
        answer = self._tier.write([_page_write(self._pages, row) for row in rows])
        self._pages.stats.watch(Direction.DEMOTE, self.name, answer, _taken)
        self._batches.append((rows, answer))

    def settle(self) -> None:
        """Process writes that have ended."""
        while self._batches and self._batches[0][1].done():
            rows, answer = self._batches.popleft()
            for row, slot in zip(rows, answer.result(), strict=True):
                self._written(row, slot)
                self._pages.unpin(row)

    def abandon(self) -> None:
        """Process writes that have ended; the others will never be waited for, though the tier may still read."""
        self.settle()
        while self._batches:
            for row in self._batches.popleft()[0]:
                self._pages.unpin(row)

    def flush(self, timeout: float) -> int:
        """Write pages for at most `timeout` seconds; returns the number not written."""
        deadline, report = time.monotonic() + timeout, time.monotonic() + FLUSH_REPORT
        self.poll()
        while self._goes_on and time.monotonic() < deadline:
            time.sleep(0.005)
            self.poll()
            if time.monotonic() > report:
                report += FLUSH_REPORT
                logger.info("CachedAttention: %s tier: up to %d pages are left to write.", self.name, self.left)
        return self.left


def _page_write(pages: Hierarchy, row: int) -> PageWrite:
    """The record of `row`, which is in host memory, under the key with which it was saved."""
    index, origin = pages.index, pages.index.aliases.origin(row)
    parent = index.parent[origin]
    return PageWrite(
        key=index.key(origin),
        parent=None if parent == NOWHERE else index.key(parent),
        base_position=index.position[row],
        checksum=index.checksum[origin],
        last_use=index.last_use[row],
        uses=index.uses[row],
        buffer=pages.host.slot_bytes(pages.in_host.slot[row]),
    )


def _taken(slots: list[int | None]) -> int:
    return len(slots) - slots.count(None)
