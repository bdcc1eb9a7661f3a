"""Write-behind from host memory to the remote store, in the order in which pages were saved."""

from __future__ import annotations

import time

from cached_attention.hierarchy import Hierarchy
from cached_attention.index import NOWHERE
from cached_attention.migration.write_behind import WriteBehind
from cached_attention.tiers.remote import RemoteTier

BATCH_PAGES = 32
BATCHES_IN_FLIGHT = 2
REFUSED_PAUSE = 0.5
"""Seconds without writes after a refused one: a full store makes room, a new master learns of its servers."""
SHARE = 0.1
"""Maximum share of the host slots that writes may hold: their pages cannot be evicted."""


class RemoteWriteBehind(WriteBehind):
    """Shares saved pages as fast as the network allows.

    A page that is evicted before its turn is not shared. While the store is full or unreachable, pages wait.
    """

    name = "remote"

    def __init__(self, pages: Hierarchy, remote: RemoteTier) -> None:
        super().__init__(pages, remote)
        self._remote = remote
        self._resume_at = 0.0
        self._most = max(1, min(BATCH_PAGES, int(SHARE * pages.host.capacity / BATCHES_IN_FLIGHT)))

    def poll(self) -> None:
        self.settle()
        while len(self._batches) < BATCHES_IN_FLIGHT and self._may_write and (rows := self._choose()):
            self._write(rows)

    @property
    def _may_write(self) -> bool:
        return self._remote.healthy and time.monotonic() >= self._resume_at

    def _choose(self) -> list[int]:
        rows: list[int] = []
        while len(rows) < self._most and (key := self._pages.remote.next_unshared()) is not None:
            row = self._pages.index.find(key)
            if row in self._pages.in_host and self._pages.in_host.ready[row]:
                self._pages.pin(row)
                rows.append(row)
        return rows

    def _written(self, row: int, slot: int | None) -> None:
        index = self._pages.index
        origin = index.aliases.origin(row)
        key, parent = index.key(origin), index.parent[origin]
        if slot is not None:
            self._pages.remote.add([key], None if parent == NOWHERE else index.key(parent))
        else:
            self._pages.remote.offer(key)
            self._resume_at = time.monotonic() + REFUSED_PAUSE

    @property
    def left(self) -> int:
        """Includes pages that will turn out to be shared already or evicted."""
        return self._pages.remote.unshared + self.rows_in_flight

    @property
    def _goes_on(self) -> bool:
        return self.left > 0 and self._may_write
