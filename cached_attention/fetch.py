"""Pages on their way to host memory, from disk or the remote store, for requests that wait, head first."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import NamedTuple

from cached_attention.hierarchy import Hierarchy
from cached_attention.index import NOWHERE, PageKey
from cached_attention.policy.waiting import Pace
from cached_attention.stats import Direction, Reason
from cached_attention.tiers.disk_pages import PageRead, ReadOutcome
from cached_attention.tiers.page_disk import PageDisk, PageSource, SharedPages


class Remote(NamedTuple):
    """Where pages come from that are not on disk."""

    tier: SharedPages
    pace: Pace
    """Learns how long its reads take, in bytes."""
    page_tokens: int


class InFlight(NamedTuple):
    """Bytes that were asked for and have not come."""

    disk: int
    remote: int


@dataclass(eq=False)
class _Read:
    """Pages asked of one tier in one call."""

    rows: list[int]
    is_remote: bool
    future: Future[list[ReadOutcome]]
    started: float
    ahead_bytes: int
    """In flight from the same tier when it was asked for."""
    ended: float | None = None

    def end(self, now: float) -> None:
        """Called by the tier's thread: the scheduler may look much later."""
        self.ended = now


@dataclass
class _Hold:
    """What is held for a request: the pinned rows of its chain that were not ready when it asked."""

    started: float
    ahead: InFlight
    first_page: int
    rows: list[int] = field(default_factory=list)
    reads: list[_Read] = field(default_factory=list)


class Fetch:
    """Reads pages into host memory and keeps them there until the request that asked runs or leaves.

    All calls come from one thread; none waits for a tier but `wait`.

    Args:
        disk, remote: at least one of them.
        pace: learns how long reads from disk take, in bytes.
    """

    def __init__(
        self,
        pages: Hierarchy,
        disk: PageDisk | None,
        pace: Pace,
        clock: Callable[[], float] = time.monotonic,
        remote: Remote | None = None,
    ) -> None:
        self._pages = pages
        self._disk = disk
        self._pace = pace
        self._clock = clock
        self._remote = remote
        source: PageSource | None = disk if remote is None else remote.tier
        assert source is not None, "pages come from nowhere"
        self.page_bytes = source.stride
        self._reads: list[_Read] = []
        self._holds: dict[str, _Hold] = {}

    @property
    def held(self) -> int:
        """Pages held for requests, those that several ask for counted for each."""
        return sum(len(hold.rows) for hold in self._holds.values())

    @property
    def pins(self) -> int:
        """Pins held for requests and reads."""
        return self.held + sum(len(read.rows) for read in self._reads)

    @property
    def is_reading(self) -> bool:
        return bool(self._reads)

    @property
    def in_flight(self) -> InFlight:
        remote = sum(len(read.rows) for read in self._reads if read.is_remote) * self.page_bytes
        return InFlight(sum(len(read.rows) for read in self._reads) * self.page_bytes - remote, remote)

    def holds_for(self, request: str) -> bool:
        return request in self._holds

    def holders(self) -> list[str]:
        """Requests that pages are held for, first come first."""
        return list(self._holds)

    def start(self, request: str, keys: Sequence[PageKey], first: int, end: int, rank: int) -> int:
        """Fetch the pages `first` to `end` of the restorable chain `keys`, evicting only what `rank` may.

        Returns the page up to which they are there or on their way; less than `end` where there is no room.
        """
        index = self._pages.index
        missing: list[int] = []
        hold = self._holds.get(request)
        for page in range(first, end):
            row = index.find(keys[page])
            if row != NOWHERE and row not in self._pages.in_host:
                self._pages.join(row)
            if row not in self._pages.in_host:
                parent = keys[page - 1] if page else None
                admitted = self._pages.admit(keys[page], parent, self._position(row, page), rank)
                if admitted is None:
                    end = page
                    break
                row = admitted
                missing.append(row)
            if not self._pages.in_host.ready[row]:
                if hold is None:
                    hold = _Hold(self._clock(), self.in_flight, page)
                    self._holds[request] = hold
                self._pages.pin(row)
                hold.rows.append(row)
        if hold is not None:
            hold.reads += self._read_all(missing)
        return end

    def _position(self, row: int, page: int) -> int:
        """Base position of a page, which may be known by its place in the chain only."""
        if row != NOWHERE and row in self._pages.on_disk:
            return self._pages.index.position[row]
        assert self._remote is not None, "a page to fetch is in no tier"
        return page * self._remote.page_tokens

    def _read_all(self, rows: Sequence[int]) -> list[_Read]:
        near = [row for row in rows if row in self._pages.on_disk]
        far = [row for row in rows if row not in self._pages.on_disk]
        reads: list[_Read] = []
        if near and self._disk is not None:
            reads.append(self._read(near, self._disk, is_remote=False))
        if far and self._remote is not None:
            reads.append(self._read(far, self._remote.tier, is_remote=True))
        self._reads += reads
        return reads

    def _read(self, rows: list[int], source: PageSource, *, is_remote: bool) -> _Read:
        future = source.read([self._page_read(row) for row in rows])
        tier = "remote" if is_remote else "disk"
        self._pages.stats.watch(Direction.FETCH, tier, future, lambda pages: pages.count(ReadOutcome.READ))
        read = _Read(rows, is_remote, future, self._clock(), self.in_flight[is_remote])
        future.add_done_callback(lambda _: read.end(self._clock()))
        return read

    def _page_read(self, row: int) -> PageRead:
        index = self._pages.index
        origin = index.origin(row)
        buffer = self._pages.host.slot_bytes(self._pages.in_host.slot[row])
        return PageRead(index.key(origin), self._pages.on_disk.slot[row], index.checksum[origin], buffer)

    def is_landing(self, request: str) -> bool:
        """Whether anything that was asked for `request` is still on its way."""
        hold = self._holds.get(request)
        return hold is not None and any(map(self._lands, hold.rows))

    def landing(self, request: str) -> int:
        """Pages asked for `request` that are still on their way."""
        hold = self._holds.get(request)
        return 0 if hold is None else sum(map(self._lands, hold.rows))

    def begun(self, request: str) -> tuple[float, InFlight] | None:
        """When the fetch for `request` began, and the bytes that were in flight then; None if it did not."""
        hold = self._holds.get(request)
        return None if hold is None else (hold.started, hold.ahead)

    def arrived(self, request: str) -> tuple[int, int]:
        """Of what `request` asked for: the place in its chain of the first page, and how many are there."""
        hold = self._holds.get(request)
        if hold is None:
            return 0, 0
        return hold.first_page, sum(bool(self._pages.in_host.ready[row]) for row in hold.rows)

    def _lands(self, row: int) -> bool:
        return row in self._pages.in_host and not self._pages.in_host.ready[row]

    def release(self, request: str) -> None:
        """Let go of what is held for `request`; reads that nobody else waits for are given up."""
        hold = self._holds.pop(request, None)
        if hold is None:
            return
        for row in hold.rows:
            self._pages.unpin(row)
        for read in hold.reads:
            alone = all(self._pages.index.pins[row] == 1 for row in read.rows)
            if read in self._reads and alone and read.future.cancel():
                self._reads.remove(read)
                self._settle(read)

    def poll(self) -> None:
        for read in [read for read in self._reads if read.future.done()]:
            self._reads.remove(read)
            self._settle(read)

    def _settle(self, read: _Read) -> None:
        outcomes = [ReadOutcome.UNAVAILABLE] * len(read.rows)
        if not read.future.cancelled():
            outcomes = read.future.result()
        if ReadOutcome.READ in outcomes:
            amount = read.ahead_bytes + len(read.rows) * self.page_bytes
            pace = self._remote.pace if read.is_remote and self._remote is not None else self._pace
            pace.observe(amount, (self._clock() if read.ended is None else read.ended) - read.started)
        removed: list[int] = []
        for row, outcome in zip(read.rows, outcomes, strict=True):
            if outcome is ReadOutcome.READ:
                self._land(row, read.is_remote)
            else:
                self._pages.give_up(row)
                if outcome is ReadOutcome.LOST:
                    removed += self._lose(row, read.is_remote)
            self._pages.unpin(row)
        if self._disk is not None:
            self._pages.stats.left("disk", Reason.DAMAGE, len(removed))
            self._disk.remove(removed)

    def _land(self, row: int, is_remote: bool) -> None:
        self._pages.stats.fetched += 1
        if is_remote and self._remote is not None:
            buffer = self._pages.host.slot_bytes(self._pages.in_host.slot[row])
            self._pages.index.checksum[row] = self._remote.tier.checksum(buffer)
        self._pages.land(row, clean=not is_remote)

    def _lose(self, row: int, is_remote: bool) -> list[int]:
        """The page is not where it was thought to be; returns the slots on disk that are free by it."""
        self._pages.stats.lost += 1
        if not is_remote:
            return self._pages.lose(row)
        self._pages.remote.discard(self._pages.index.key(row))
        return []

    def wait(self) -> None:
        """Until the disk touches no page of the arena; nothing is held any more."""
        for request in list(self._holds):
            self.release(request)
        for read in self._reads:
            read.future.exception()
        self.poll()
