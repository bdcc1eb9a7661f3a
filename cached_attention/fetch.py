"""Pages on their way from disk to host memory, for requests that wait, head of the chain first."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field

from cached_attention.hierarchy import Hierarchy
from cached_attention.index import PageKey
from cached_attention.policy.waiting import Pace
from cached_attention.stats import Direction, Reason
from cached_attention.tiers.disk_pages import PageRead, ReadOutcome
from cached_attention.tiers.page_disk import PageDisk


@dataclass(eq=False)
class _Read:
    """Pages asked of the disk in one call."""

    rows: list[int]
    future: Future[list[ReadOutcome]]
    started: float
    ahead_bytes: int
    """In flight when it was asked for."""


@dataclass
class _Hold:
    """What is held for a request: the pinned rows of its chain that were not ready when it asked."""

    started: float
    ahead_bytes: int
    first_page: int
    rows: list[int] = field(default_factory=list)
    reads: list[_Read] = field(default_factory=list)


class Fetch:
    """Reads pages into host memory and keeps them there until the request that asked runs or leaves.

    All calls come from one thread; none waits for the disk but `wait`.

    Args:
        pace: learns how long reads take, in bytes.
    """

    def __init__(
        self, pages: Hierarchy, disk: PageDisk, pace: Pace, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._pages = pages
        self._disk = disk
        self._pace = pace
        self._clock = clock
        self.page_bytes = disk.stride
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
    def bytes_in_flight(self) -> int:
        return sum(len(read.rows) for read in self._reads) * self.page_bytes

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
            if row not in self._pages.in_host:
                self._pages.join(row)
            if row not in self._pages.in_host:
                parent = keys[page - 1] if page else None
                admitted = self._pages.admit(keys[page], parent, index.position[row], rank)
                if admitted is None:
                    end = page
                    break
                missing.append(row)
            if not self._pages.in_host.ready[row]:
                if hold is None:
                    hold = _Hold(self._clock(), self.bytes_in_flight, page)
                    self._holds[request] = hold
                self._pages.pin(row)
                hold.rows.append(row)
        if missing and hold is not None:
            hold.reads.append(self._read(missing))
        return end

    def _read(self, rows: list[int]) -> _Read:
        ahead = self.bytes_in_flight
        future = self._disk.read([self._page_read(row) for row in rows])
        self._pages.stats.watch(Direction.FETCH, "disk", future, lambda pages: pages.count(ReadOutcome.READ))
        read = _Read(rows, future, self._clock(), ahead)
        self._reads.append(read)
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

    def begun(self, request: str) -> tuple[float, int] | None:
        """When the fetch for `request` began, and the bytes that were in flight then; None if it did not."""
        hold = self._holds.get(request)
        return None if hold is None else (hold.started, hold.ahead_bytes)

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
            self._pace.observe(amount, self._clock() - read.started)
        removed: list[int] = []
        for row, outcome in zip(read.rows, outcomes, strict=True):
            if outcome is ReadOutcome.READ:
                self._pages.land(row, clean=True)
                self._pages.stats.fetched += 1
            else:
                self._pages.give_up(row)
                if outcome is ReadOutcome.LOST:
                    removed += self._pages.lose(row)
                    self._pages.stats.lost += 1
            self._pages.unpin(row)
        self._pages.stats.left("disk", Reason.DAMAGE, len(removed))
        self._disk.remove(removed)

    def wait(self) -> None:
        """Until the disk touches no page of the arena; nothing is held any more."""
        for request in list(self._holds):
            self.release(request)
        for read in self._reads:
            read.future.exception()
        self.poll()
