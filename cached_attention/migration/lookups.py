"""Looks up pages of queued requests that this server does not have in the remote store."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass

from cached_attention.hierarchy import Hierarchy
from cached_attention.index import PageKey
from cached_attention.policy.waiting import Outstanding, WaitOrRecompute
from cached_attention.tiers.remote import RemoteTier


@dataclass
class _Lookup:
    keys: Sequence[PageKey]
    """The whole chain, or of scattered pages those that are looked up."""
    first: int
    """The first page that was looked up."""
    on_device: int
    """Leading pages that are on the device."""
    useful: int
    """Maximum number of pages to fetch if all are there."""
    page_tokens: int
    """Tokens to recompute per page if nothing is there."""
    answer: Future[list[int]]
    held_since: float | None = None
    """When the scheduler would first have run the request."""


class Lookups:
    """Makes one lookup per request and length of its chain; `poll` returns the results.

    All calls come from one thread; none waits.

    Args:
        page_tokens: tokens per page.
    """

    def __init__(
        self,
        pages: Hierarchy,
        remote: RemoteTier,
        decision: WaitOrRecompute,
        page_tokens: int,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._pages = pages
        self._remote = remote
        self._decision = decision
        self._page_tokens = page_tokens
        self._clock = clock
        self._open: dict[str, _Lookup] = {}
        self._asked: dict[str, tuple[int, bool]] = {}
        """Per queued request: length of its chain in pages, and whether some of it was not on the device."""

    def look_up(self, request: str, keys: Sequence[PageKey], restorable: int, on_device: int = 0) -> None:
        """Look up the pages of the chain `keys` after the first `restorable`, unless that was done before.

        Skipped if the whole chain is on the device, which has its first `on_device` pages.
        """
        if not self._is_new(request, (len(keys), on_device < len(keys))):
            return
        self._offer(keys[:restorable])
        if max(restorable, on_device) < len(keys):
            self._submit(request, keys, restorable, on_device, len(keys) - restorable, self._page_tokens)

    def _is_new(self, request: str, state: tuple[int, bool]) -> bool:
        """Whether the store may be asked, and `request` has not asked in this `state` before."""
        if self._asked.get(request) == state or not self._remote.healthy:
            return False
        self._asked[request] = state
        return True

    def _submit(
        self, request: str, keys: Sequence[PageKey], first: int, on_device: int, useful: int, page_tokens: int
    ) -> None:
        self._pages.stats.lookups += 1
        answer = self._remote.exist(keys[first:])
        self._open[request] = _Lookup(keys, first, on_device, useful, page_tokens, answer)

    def _offer(self, keys: Sequence[PageKey]) -> None:
        """Offer pages in use that are not known to be in the store for sharing again: it may have lost them."""
        index, remote = self._pages.index, self._pages.remote
        for key in keys:
            if key not in remote and (row := index.find(key)) in self._pages.in_host:
                remote.offer(index.key(index.aliases.origin(row)))

    def leave(self, request: str) -> None:
        """`request` runs or was aborted."""
        self._open.pop(request, None)
        self._asked.pop(request, None)

    def poll(self) -> list[tuple[str, Sequence[PageKey]]]:
        """Requests for which new pages were found, beyond those on the device, with their chains."""
        found: list[tuple[str, Sequence[PageKey]]] = []
        for request, lookup in [entry for entry in self._open.items() if entry[1].answer.done()]:
            del self._open[request]
            if self._learn(lookup):
                found.append((request, lookup.keys))
        return found

    def _learn(self, lookup: _Lookup) -> bool:
        """Whether there are pages beyond those on the device."""
        keys, first, there = lookup.keys, lookup.first, lookup.answer.result()
        end = first + (there.index(0) if 0 in there else len(there))
        self._pages.remote.add(keys[first:end], keys[first - 1] if first else None)
        return end > max(first, lookup.on_device)

    def is_ready(self, request: str, may_give_up: bool) -> bool:
        """Whether no lookup is pending for `request`, or waiting for it is not expected to pay off."""
        lookup = self._open.get(request)
        if lookup is None:
            return True
        if not may_give_up:
            return False
        now = self._clock()
        lookup.held_since = now if lookup.held_since is None else lookup.held_since
        missing, held = len(lookup.keys) - lookup.first, now - lookup.held_since
        size = lookup.useful * self._remote.stride
        fetch = Outstanding(held, held, 0, 0, missing * lookup.page_tokens, remote_bytes=size)
        if self._decision.is_worth_waiting(fetch):
            return False
        del self._open[request]
        return True


class ScatteredLookups(Lookups):
    """Looks up pages that are useful without the pages before them, see `TrailingStore`.

    `seek` looks up the whole prompt of a request, so `look_up`, for chains of it, needs no lookup.
    """

    def look_up(self, request: str, keys: Sequence[PageKey], restorable: int, on_device: int = 0) -> None:
        """Offer the first `restorable` of the pages `keys` for sharing, unless that was done before."""
        if self._is_new(request, (len(keys), on_device < len(keys))):
            self._offer(keys[:restorable])

    def seek(self, request: str, keys: Sequence[PageKey], useful: int, page_tokens: int) -> None:
        """Look up those of the pages `keys` that are not in a tier, unless that was done before.

        Args:
            useful: maximum number of pages that will be fetched.
            page_tokens: tokens to recompute per page that is not there.
        """
        if not self._is_new(request, (len(keys), True)):
            return
        if missing := [key for key in keys if not self._pages.is_known(key)]:
            self._submit(request, missing, 0, 0, min(useful, len(missing)), page_tokens)

    def _learn(self, lookup: _Lookup) -> bool:
        there = [key for key, is_there in zip(lookup.keys, lookup.answer.result(), strict=True) if is_there]
        for key in there:
            self._pages.remote.add([key], None)
        return bool(there)
