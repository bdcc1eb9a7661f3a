"""Prefetches the pages that queued requests need into host memory, in the order of the queue."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import islice

from cached_attention.hierarchy import Hierarchy
from cached_attention.hints import Hints
from cached_attention.index import PageKey
from cached_attention.migration.fetch import Fetch
from cached_attention.policy.waiting import Outstanding, WaitOrRecompute

HELD = 0.9
"""Share of the host slots that fetched pages may hold; the rest is left for loads and saves."""
HINTED = 0.5
"""Like `HELD`, for conversations that clients expect to continue: they must leave room for those that do."""
BATCH = 16
"""Maximum number of pages requested in one call."""
ASKING, ASKING_MOST, ASKING_SHARE = 1e-4, 2e-3, 0.01
"""Seconds after which a pass requests no more pages: `ASKING_SHARE` of the time since the last pass, but at least
`ASKING` and at most `ASKING_MOST`.

A pass makes at least one call, so the disk is never idle while there is work: pages of 16 tokens of an 8B model
are 2 MiB, and a `BATCH` of them keeps a disk of 7 GB/s busy for 5 ms; with pages of 64 tokens, for 20 ms. If
passes are long, because of long prefills, there is time to request what the disk can read meanwhile.
"""
REVIEWED = 8
"""Requests for which a pass decides again whether they keep waiting: this many at the front of the queue, and as
many of the others, in rotation."""


@dataclass(slots=True)
class _Prefetch:
    """What one request lacks in host memory."""

    keys: Sequence[PageKey]
    """The restorable part of its chain."""
    first: int
    remote: int
    """Number of these pages that are only in the remote store."""
    next: int
    """The first page that has not been requested yet."""
    page_tokens: int
    """Tokens to recompute per page that is not waited for."""
    held_since: float | None = None
    """When the scheduler would first have run the request."""
    given_up: bool = False
    """Whether the request may run with the pages that it has."""

    @property
    def pages(self) -> int:
        return len(self.keys) - self.first

    @property
    def is_whole(self) -> bool:
        return self.next >= len(self.keys)

    def cut_short(self) -> None:
        """The page to request next was lost: wait neither for it nor for the rest."""
        self.keys = self.keys[: self.next]
        self.remote = min(self.remote, self.pages)

    def extend(self, keys: Sequence[PageKey], page_tokens: int, is_kept: Callable[[PageKey], bool]) -> None:
        """More of the chain turned out to be restorable; requested reads continue."""
        self.remote += sum(not is_kept(key) for key in keys[len(self.keys) :])
        self.keys, self.page_tokens = keys, page_tokens


class LookAhead:
    """Starts fetches in the order of the queue, as long as their pages fit into host memory.

    The paper's look-ahead window for prefetching is the memory available for it divided by the mean size of a
    conversation (section 3.3.1); here the bytes themselves are counted. If a request that has moved forward in
    the queue finds no room, pages held for the last requests in the queue are released for it.

    Args:
        window: number of requests at the front of the queue to prefetch for.
    """

    def __init__(
        self,
        pages: Hierarchy,
        fetch: Fetch,
        decision: WaitOrRecompute,
        window: int,
        page_tokens: int,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._pages = pages
        self._fetch = fetch
        self._decision = decision
        self._window = window
        self._page_tokens = page_tokens
        self._clock = clock
        self._prefetches: dict[str, _Prefetch] = {}
        self._waits: dict[str, None] = {}
        """Requests that were decided to keep waiting, oldest decision first."""
        self._passed_at = clock()
        self._open: set[str] = set()
        """Requests with pages that have not been requested yet."""

    def _limit(self, request: str) -> int:
        """Maximum number of pages held for all requests when more are requested for this one."""
        share = HINTED if Hints.is_name(request) else HELD
        return max(1, int(share * self._pages.host.capacity))

    @property
    def depth(self) -> int:
        """Number of requests whose pages are all on their way or held."""
        return len(self._prefetches) - len(self._open)

    def prefetch(
        self, request: str, keys: Sequence[PageKey], loadable: int, page_tokens: int | None = None
    ) -> None:
        """The queued `request` can use the pages `keys`, of which the first `loadable` are in host memory.

        Pages beyond those that fit into host memory at once are not waited for.

        Args:
            page_tokens: tokens to recompute per page that is not waited for; the page size unless given.
        """
        keys = keys[: min(loadable + self._limit(request), self._pages.host.capacity)]
        known = self._prefetches.get(request)
        if loadable >= len(keys) or (known is not None and (known.given_up or len(known.keys) >= len(keys))):
            return
        if known is None:
            known = self._prefetches[request] = _Prefetch(keys[:loadable], loadable, 0, loadable, 0)
        known.extend(keys, page_tokens or self._page_tokens, self._pages.is_kept)
        self._open.add(request)

    def leave(self, request: str) -> None:
        """`request` runs or was aborted."""
        prefetch = self._prefetches.pop(request, None)
        if prefetch is not None and prefetch.given_up:
            self._pages.stats.recomputed += self._missing(request, prefetch)
        self._fetch.release(request)
        self._open.discard(request)
        self._waits.pop(request, None)

    def advance(self) -> None:
        """A pass begins: request more pages, in the order of the queue, for as long as `ASKING` allows."""
        until = self._begin_pass()
        for rank, request in enumerate(self._pages.waiting.requests[: self._window] if self._open else ()):
            while request in self._open:
                requested = self._request_more(request, rank)
                if request in self._open and not requested:
                    return  # No room: later requests must not overtake.
                if self._clock() >= until:
                    return

    def _begin_pass(self) -> float:
        """Returns the time at which the pass must stop requesting pages."""
        now = self._clock()
        since, self._passed_at = now - self._passed_at, now
        for request in (*islice(self._waits, REVIEWED), *self._pages.waiting.requests[:REVIEWED]):
            self._waits.pop(request, None)
        return now + min(max(ASKING, ASKING_SHARE * since), ASKING_MOST)

    def _request_more(self, request: str, rank: int) -> int:
        """Request another batch for the request at `rank`; returns its number of pages."""
        prefetch = self._prefetches[request]
        if prefetch.next == prefetch.first:  # Nothing is held yet: pages may have left host memory.
            prefetch.first = prefetch.next = self._pages.loadable(prefetch.keys, prefetch.first)
            if prefetch.remote:  # Some may have come for another request.
                prefetch.remote = sum(not self._pages.is_kept(key) for key in prefetch.keys[prefetch.first :])
        end = min(prefetch.next + min(BATCH, self._room(request, rank)), len(prefetch.keys))
        first, prefetch.next = prefetch.next, self._fetch.start(request, prefetch.keys, prefetch.next, end, rank)
        if prefetch.next < end and not self._pages.is_known(prefetch.keys[prefetch.next]):
            prefetch.cut_short()
        if prefetch.is_whole:
            self._open.discard(request)
        return prefetch.next - first

    def _room(self, request: str, rank: int) -> int:
        """Number of pages that may be held for the request at `rank`, after releasing those of later requests."""
        limit = self._limit(request)
        while self._fetch.held >= limit and (last := self._last_holder(rank)) is not None:
            self._fetch.release(last)
            self._fetch.poll()
            self._prefetches[last].next = self._prefetches[last].first
            self._open.add(last)
        return max(0, limit - self._fetch.held)

    def _last_holder(self, rank: int) -> str | None:
        waiting = self._pages.waiting
        behind = [(waiting.rank(holder), holder) for holder in self._fetch.holders() if holder in waiting]
        last, holder = max(behind, default=(-1, ""))
        return holder if last > rank else None

    def is_ready(self, request: str, may_give_up: bool = True) -> bool:
        """Whether `request` may run: nothing is being fetched for it, or waiting is not expected to pay off.

        Fetching continues until it really runs: there may be no room for it in the batch for a while.
        """
        prefetch = self._prefetches.get(request)
        if prefetch is None or prefetch.given_up:
            return True
        if request not in self._open and not self._fetch.outstanding(request):
            return True
        if request in self._waits or not may_give_up:
            return False
        prefetch.given_up = not self._decision.is_worth_waiting(self._outstanding(request, prefetch))
        if prefetch.given_up:
            self._waits.pop(request, None)
            self._pages.stats.given_up += 1
        else:
            self._waits[request] = None
        return prefetch.given_up

    def gave_up(self, request: str) -> bool:
        """Whether `request` may run because waiting for its pages is not expected to pay off."""
        prefetch = self._prefetches.get(request)
        return prefetch is not None and prefetch.given_up

    def _missing(self, request: str, prefetch: _Prefetch) -> int:
        """Number of pages that are not in host memory yet."""
        return self._fetch.outstanding(request) + len(prefetch.keys) - prefetch.next

    def _outstanding(self, request: str, prefetch: _Prefetch) -> Outstanding:
        now = self._clock()
        prefetch.held_since = now if prefetch.held_since is None else prefetch.held_since
        since, ahead = self._fetch.begun(request) or (prefetch.held_since, self._fetch.in_flight)
        return Outstanding(
            waited=now - since,
            held=now - prefetch.held_since,
            total_bytes=(prefetch.pages - prefetch.remote) * self._fetch.page_bytes,
            ahead_bytes=ahead.disk,
            missing_tokens=self._missing(request, prefetch) * prefetch.page_tokens,
            remote_bytes=prefetch.remote * self._fetch.page_bytes + ahead.remote if prefetch.remote else 0,
        )
