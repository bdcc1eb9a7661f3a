"""Fetches pages from disk or the remote store into host memory for queued requests, head first."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import NamedTuple

from cached_attention import admission, page_runs
from cached_attention.hierarchy import Hierarchy
from cached_attention.index import NOWHERE, PageKey
from cached_attention.migration.fetch_source import DiskSource, FetchSource, RemoteSource
from cached_attention.stats import Direction
from cached_attention.tiers.page_io import PageRead, ReadOutcome

SETTLING = 2.5e-4
"""Seconds after which a poll leaves further arrivals to the next one: a burst must not hold up a pass."""


class BytesInFlight(NamedTuple):
    """Bytes requested but not yet received."""

    disk: int
    remote: int


class FetchedSpan(NamedTuple):
    """The pages fetched for a request: consecutive pages of its chain."""

    first_page: int = 0
    """Place of the first of them in the chain."""
    pages: int = 0
    remote_pages: Sequence[int] = ()
    """Places of those from the remote store, in order; the others came from disk."""


@dataclass(eq=False)
class _Read:
    """Pages requested from one tier in one call."""

    rows: list[int]
    source: FetchSource
    future: Future[list[ReadOutcome]]
    started: float
    ahead_bytes: int
    """Bytes in flight from the same tier when this read was requested."""
    ended: float | None = None
    """Set by the tier's thread, since the scheduler may look much later."""


@dataclass
class _Hold:
    """What is held for a request: pinned rows of its chain that were not ready when they were requested."""

    started: float
    ahead: BytesInFlight
    first_page: int
    rows: list[int] = field(default_factory=list)
    reads: list[_Read] = field(default_factory=list)
    landed: int = 0
    """Leading rows that are known to be no longer on their way."""
    remote_pages: list[int] = field(default_factory=list)
    """Places in the chain of the rows requested from the remote store."""


class _Found(NamedTuple):
    """Consecutive pages with a slot in host memory."""

    rows: list[int]
    are_new: bool
    """Whether they got their slots just now, and have to be read."""
    is_short: bool
    """Whether the page after them gets no slot."""


class Fetch:
    """Reads pages into host memory and pins them there until their request runs or leaves the queue.

    All calls come from one thread, and none waits for a tier.
    """

    def __init__(
        self,
        pages: Hierarchy,
        disk: DiskSource | None,
        remote: RemoteSource | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._pages = pages
        self._disk, self._remote = disk, remote
        self._sources = [source for source in (disk, remote) if source is not None]
        self._clock = clock
        self.page_bytes = self._sources[0].tier.stride if self._sources else 0
        self._reads: set[_Read] = set()
        self._ended: deque[_Read] = deque()
        """Filled by the tiers' threads."""
        self._holds: dict[str, _Hold] = {}
        self.held = 0
        """Pages held for requests, counted once per request that holds them."""

    @property
    def in_flight(self) -> BytesInFlight:
        pages = (0 if source is None else source.coming for source in (self._disk, self._remote))
        return BytesInFlight(*(count * self.page_bytes for count in pages))

    @property
    def pins(self) -> int:
        """Number of pins held for requests and reads."""
        return self.held + sum(source.coming for source in self._sources)

    @property
    def is_reading(self) -> bool:
        return bool(self._reads)

    def holders(self) -> list[str]:
        """Requests that pages are held for, oldest first."""
        return list(self._holds)

    def start(self, request: str, keys: Sequence[PageKey], first: int, end: int, rank: int) -> int:
        """Fetch the pages `first` to `end` of the chain `keys`, evicting only what a request at `rank` may evict.

        Returns the page up to which they are in host memory or on their way; less than `end` if there is no room
        for the next one, or it is in no tier.
        """
        missing: list[int] = []
        coming: list[tuple[int, int]] = []
        """Place in the chain, and row."""
        page, is_short = first, False
        while page < end and not is_short:
            rows, are_new, is_short = self._find_or_admit(keys, page, end, rank)
            if are_new:
                missing += rows
            if rows and not self._pages.in_host.ready[rows[0]]:
                coming += enumerate(rows, page)
            page += len(rows)
        if coming:
            hold = self._hold(request, coming)
            hold.reads += self._read_all(missing)
            if self._remote is not None and (far := self._remote.rows):
                hold.remote_pages += [place for place, row in coming if row in far]
        return page

    def _find_or_admit(self, keys: Sequence[PageKey], page: int, end: int, rank: int) -> _Found:
        """One or more pages of the chain `keys`, from `page` on."""
        if run := page_runs.find_on_disk(self._pages, keys, page, end):
            rows = admission.admit_run(self._pages, run, rank)
            return _Found(rows, are_new=True, is_short=len(rows) < len(run))
        row = self._pages.index.find(keys[page])
        if row != NOWHERE and row not in self._pages.in_host:
            self._pages.join(row)
        if row in self._pages.in_host:
            return _Found([row], are_new=False, is_short=False)
        admitted = self._admit(keys, page, row, rank)
        return _Found([], True, True) if admitted is None else _Found([admitted], True, False)

    def _admit(self, keys: Sequence[PageKey], page: int, row: int, rank: int) -> int | None:
        """The row of a page, known as `row`, with a host slot; None if it is in no tier, or there is no room."""
        if not self._pages.is_known(keys[page]):
            return None
        parent = keys[page - 1] if page else None
        return admission.admit(self._pages, keys[page], parent, self._position(row, page), rank)

    def _hold(self, request: str, coming: list[tuple[int, int]]) -> _Hold:
        hold = self._holds.get(request)
        if hold is None:
            hold = self._holds[request] = _Hold(self._clock(), self.in_flight, coming[0][0])
        for _, row in coming:
            self._pages.pin(row)
            hold.rows.append(row)
        self.held += len(coming)
        return hold

    def _position(self, row: int, page: int) -> int:
        """Base position of a page; if it is not on disk, its place in the chain gives it."""
        if row != NOWHERE and row in self._pages.on_disk:
            return self._pages.index.position[row]
        assert self._remote is not None, "a page to fetch is in no tier"
        return page * self._remote.page_tokens

    def _read_all(self, rows: Sequence[int]) -> list[_Read]:
        near = [row for row in rows if row in self._pages.on_disk]
        far = [row for row in rows if row not in self._pages.on_disk]
        reads: list[_Read] = []
        if near and self._disk is not None:
            reads.append(self._read(near, self._disk))
        if far and self._remote is not None:
            reads.append(self._read(far, self._remote))
        return reads

    def _read(self, rows: list[int], source: FetchSource) -> _Read:
        future = source.tier.read(self._page_reads(rows))
        self._pages.stats.watch(Direction.FETCH, source.name, future, lambda read: read.count(ReadOutcome.READ))
        read = _Read(rows, source, future, self._clock(), source.coming * self.page_bytes)
        self._reads.add(read)
        source.begin(rows)
        future.add_done_callback(lambda _: self._end(read))
        return read

    def _end(self, read: _Read) -> None:
        read.ended = self._clock()
        self._ended.append(read)

    def _page_reads(self, rows: Sequence[int]) -> list[PageRead]:
        index, slot_bytes = self._pages.index, self._pages.host.slot_bytes
        in_host, on_disk = self._pages.in_host.slot, self._pages.on_disk.slot
        key, checksum = index.key, index.checksum
        return [
            PageRead(key(origin), on_disk[row], checksum[origin], slot_bytes(in_host[row]))
            for row, origin in zip(rows, map(index.aliases.origin, rows), strict=True)
        ]

    def outstanding(self, request: str) -> int:
        """Number of pages requested for `request`, from the first that is still on its way to the last."""
        hold = self._holds.get(request)
        if hold is None:
            return 0
        rows, ready, slot = hold.rows, self._pages.in_host.ready, self._pages.in_host.slot
        while hold.landed < len(rows):
            row = rows[hold.landed]
            if not ready[row] and slot[row] != NOWHERE:
                break
            hold.landed += 1
        return len(rows) - hold.landed

    def begun(self, request: str) -> tuple[float, BytesInFlight] | None:
        """When the fetch for `request` began, and the bytes in flight then; None if it has not begun."""
        hold = self._holds.get(request)
        return None if hold is None else (hold.started, hold.ahead)

    def span(self, request: str) -> FetchedSpan:
        """The pages requested for `request` that have arrived."""
        hold = self._holds.get(request)
        if hold is None:
            return FetchedSpan()
        pages = sum(bool(self._pages.in_host.ready[row]) for row in hold.rows)
        end = hold.first_page + pages
        return FetchedSpan(hold.first_page, pages, [page for page in hold.remote_pages if page < end])

    def release(self, request: str) -> None:
        """Release what is held for `request`; cancels reads that nothing else needs, which `poll` settles."""
        hold = self._holds.pop(request, None)
        if hold is None:
            return
        self.held -= len(hold.rows)
        page_runs.unpin(self._pages, hold.rows)
        pins = self._pages.index.pins
        for read in hold.reads:
            if read in self._reads and all(pins[row] == 1 for row in read.rows):
                read.future.cancel()

    def poll(self) -> None:
        """Process reads that have ended, for at most `SETTLING` seconds; the next poll continues."""
        until = self._clock() + SETTLING
        while self._ended:
            self._settle(self._ended.popleft())
            if self._clock() >= until:
                return

    def _settle(self, read: _Read) -> None:
        if read not in self._reads:
            return
        self._reads.remove(read)
        read.source.end(read.rows)
        outcomes = [ReadOutcome.UNAVAILABLE] * len(read.rows)
        if read.future.done() and not read.future.cancelled():
            outcomes = read.future.result()
        landed, missing, lost = list[int](), list[int](), list[int]()
        for row, outcome in zip(read.rows, outcomes, strict=True):
            (landed if outcome is ReadOutcome.READ else missing).append(row)
            if outcome is ReadOutcome.LOST:
                lost.append(row)
        if landed:
            self._observe(read)
            self._pages.stats.fetched += len(landed)
            read.source.land(landed)
        if missing:
            self._pages.stats.lost += len(lost)
            read.source.give_up(missing, lost)
        page_runs.unpin(self._pages, read.rows)

    def _observe(self, read: _Read) -> None:
        amount = read.ahead_bytes + len(read.rows) * self.page_bytes
        read.source.pace.observe(amount, (self._clock() if read.ended is None else read.ended) - read.started)

    @property
    def reads(self) -> list[tuple[str, Future[list[ReadOutcome]]]]:
        """All reads that have not been processed, with the tier that they read from."""
        return [(read.source.name, read.future) for read in self._reads]

    @property
    def slots_in_flight(self) -> list[int]:
        """Host slots that reads may be writing to."""
        slot = self._pages.in_host.slot
        return [slot[row] for read in self._reads if not read.future.done() for row in read.rows]

    def release_all(self) -> None:
        """Release what is held for all requests."""
        for request in list(self._holds):
            self.release(request)

    def settle(self) -> None:
        """Process all reads; those that have not ended will never be waited for."""
        for read in list(self._reads):
            self._settle(read)
