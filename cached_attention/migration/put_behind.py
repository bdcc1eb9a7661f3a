"""Write-behind from host memory to the remote store, in the order in which pages were saved."""

from __future__ import annotations

import time
from concurrent.futures import Future

from cached_attention.hierarchy import Hierarchy
from cached_attention.index import NOWHERE
from cached_attention.migration.in_flight import InFlight
from cached_attention.migration.write_behind import page_write, written
from cached_attention.stats import Direction
from cached_attention.tiers.remote import RemoteTier

BATCH_PAGES = 32
BATCHES_IN_FLIGHT = 2
REFUSED_PAUSE = 0.5
"""Seconds without puts after a refused one: a full store makes room, a new master learns of its servers."""
SHARE = 0.1
"""Maximum share of the host slots that puts may hold: their pages cannot be evicted."""


class PutBehind:
    """Shares saved pages as fast as the network allows. All calls come from one thread; `poll` never waits.

    A page that is evicted before its turn is not shared. While the store is full or unreachable, pages wait.
    """

    def __init__(self, pages: Hierarchy, remote: RemoteTier) -> None:
        self._pages = pages
        self._remote = remote
        self._resume_at = 0.0
        self._puts = InFlight(pages)
        self._most = max(1, min(BATCH_PAGES, int(SHARE * pages.host.capacity / BATCHES_IN_FLIGHT)))

    @property
    def rows_in_flight(self) -> int:
        return self._puts.rows

    @property
    def waiting(self) -> int:
        """Number of pages to put, including those that will turn out to be shared already or evicted."""
        return self._pages.remote.unshared + self.rows_in_flight

    def poll(self) -> None:
        """Process puts that have ended, and start more."""
        self.settle()
        while len(self._puts) < BATCHES_IN_FLIGHT and self._may_put and (rows := self._choose()):
            for row in rows:
                self._pages.pin(row)
            future = self._remote.write([page_write(self._pages, row) for row in rows])
            self._pages.stats.watch(Direction.DEMOTE, "remote", future, written)
            self._puts.add(rows, future)

    @property
    def _may_put(self) -> bool:
        return self._remote.healthy and time.monotonic() >= self._resume_at

    def _choose(self) -> list[int]:
        rows: list[int] = []
        while len(rows) < self._most and (key := self._pages.remote.next_unshared()) is not None:
            row = self._pages.index.find(key)
            if row in self._pages.in_host and self._pages.in_host.ready[row]:
                rows.append(row)
        return rows

    @property
    def futures(self) -> list[Future[list[int | None]]]:
        """Of all puts that have not been processed."""
        return self._puts.answers

    def give_up(self) -> None:
        """Process puts that have ended; the others will never be waited for."""
        self.settle()
        self._puts.abandon()

    def settle(self) -> None:
        """Process puts that have ended."""
        index = self._pages.index
        for row, put in self._puts.settled():
            origin = index.origin(row)
            key, parent = index.key(origin), index.parent[origin]
            if put is not None:
                self._pages.remote.add([key], None if parent == NOWHERE else index.key(parent))
            else:
                self._pages.remote.offer(key)
                self._resume_at = time.monotonic() + REFUSED_PAUSE

    def flush(self, timeout: float) -> None:
        """Put waiting pages for at most `timeout` seconds, or until a put is refused."""
        deadline = time.monotonic() + timeout
        self.poll()
        while self.waiting and self._may_put and time.monotonic() < deadline:
            time.sleep(0.005)
            self.poll()
