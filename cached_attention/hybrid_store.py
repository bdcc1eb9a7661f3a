"""A store for hybrid models: KV of the full-attention layers, and what the other layers need besides."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import count
from typing import Any, NamedTuple

import torch

from cached_attention.chain import Chain, PageRun
from cached_attention.index import PageKey
from cached_attention.store import CachedAttentionStore
from cached_attention.trailing_store import TrailingStore
from cached_attention.transfer.layer_wise_load import LayerWiseLoad
from cached_attention.transfer.streams import Event


class _Saved(NamedTuple):
    """Which of the two stores take part in a save. Each store reports its saves in order."""

    pages: bool
    trailing: bool


@dataclass
class Queued:
    """A request in the queue, and what is brought up for it."""

    chain: Chain
    on_device: int
    end: int
    """Number of pages of the chain after which it is to resume."""
    tail: Sequence[PageKey]
    """What it needs from the trailing store."""
    parts: dict[str, Chain]
    """Of `tail`, by the name under which each is queued there: a chain is kept through its last page."""
    is_undecided: bool = False
    """Whether pages were found or lost since it arrived."""


class HybridStore(CachedAttentionStore):
    """Keeps KV page by page, and in `trailing` what some layers need for the last pages of a prefix only.

    A layer with linear attention or Mamba keeps one state per sequence, whatever its length. A state cannot be
    split, so a conversation resumes at the end of a page whose state was saved. A layer with a sliding window
    reads only the last tokens before the new ones. Either way the full-attention layers need the KV of all pages
    up to that point.

    States and windows are in a store of their own, under the keys of the pages that they follow or belong to.
    Both stores fetch what the queue needs; each evicts independently.

    Args:
        trailing: made for the pool of states, or of layers with windows. This store drives and closes it.
        span: number of its last pages that a prefix needs: 1 for states, else the pages that cover a window.
        options: of `CachedAttentionStore`, like the positional arguments. With a remote tier, `trailing` has one
            of its own.
    """

    def __init__(self, *args: Any, trailing: TrailingStore, span: int = 1, **options: Any) -> None:
        self.trailing = trailing
        self.span = span
        self.queued: dict[str, Queued] = {}
        """Per queued request."""
        self.decides_alone = True
        """Whether this rank may choose by itself where a request resumes; if not, see `is_undecided`."""
        self._saved: deque[_Saved] = deque()
        """Saves that have not been popped."""
        super().__init__(*args, **options)

    # Looking up

    def ends(self, chain: Chain, pages: int, on_device: int = 0) -> Iterator[int]:
        """Lengths in pages, up to `pages`, at which `chain` can be resumed from host memory, longest first.

        Args:
            on_device: leading pages that are on the device, with all that resuming there needs.
        """
        return self._ends(chain, pages, on_device, self.trailing.is_loadable)

    def held_ends(self, chain: Chain, pages: int, on_device: int = 0) -> Iterator[int]:
        """Like `ends`, from any tier."""
        return self._ends(chain, pages, on_device, self.trailing.is_restorable)

    def _ends(self, chain: Chain, pages: int, on_device: int, has: Callable[[PageKey], bool]) -> Iterator[int]:
        # Called for waiting requests in each pass, and most pages of a long prompt have no state.
        keys, there = chain.keys, 0
        known, remote = self.trailing.known_pages, self.trailing.remote_pages
        for page in range(pages, on_device, -1):
            key = keys[page - 1]
            there = there + 1 if (key in known or key in remote) and has(key) else 0
            if there >= self.span:
                yield page + self.span - 1
        yield from range(on_device + min(there, self.span - 1), on_device, -1)

    def _tail(self, chain: Chain, end: int, on_device: int) -> Sequence[PageKey]:
        """Pages of the trailing store that are needed to resume at `end`."""
        return chain.keys[max(0, end - self.span, min(on_device, end)) : end]

    # The waiting queue

    def arrive(
        self,
        request: str,
        chain: Chain,
        page_tokens: int | None = None,
        on_device: int = 0,
        end: int | None = None,
    ) -> int:
        """See `CachedAttentionStore.arrive`; linear in the length of `chain`, whose last end it looks for.

        Args:
            on_device: as for `ends`.
            end: the one of `held_ends` to fetch; the longest unless given.
        """
        pages = self._find_end(chain, on_device) if end is None else end
        loadable = min(self.loadable_pages(chain), pages)
        lost = self._lost_tokens(chain, loadable, pages, on_device)
        self._wait_for(request, chain, pages, page_tokens or self._per_page(lost, pages - loadable), on_device)
        # All of it, even if some is on the device: that may be evicted before the request runs.
        tail = self._tail(chain, pages, 0)
        parts = self._wait_for_tail(request, tail, lost)
        if on_device < len(chain.keys):
            self.trailing.seek(request, chain.keys, self.span, self.layout.page_size)
        self.queued[request] = Queued(chain, on_device, pages, tail, parts)
        return pages

    def is_undecided(self, request: str) -> bool:
        """Whether pages of the queued `request` were found or lost since all ranks chose where it resumes."""
        return (queued := self.queued.get(request)) is not None and queued.is_undecided

    def _found(self, request: str, keys: Sequence[PageKey]) -> None:
        self._find_again(request)

    def _find_again(self, request: str) -> None:
        """Pages of the queued `request` were found or lost, so that it may resume at another end."""
        if (queued := self.queued.get(request)) is None:
            return
        if self.decides_alone:
            self.arrive(request, queued.chain, on_device=queued.on_device)
        else:
            queued.is_undecided = True

    def _has_lost(self, queued: Queued) -> bool:
        """Whether something was lost that it needs, beside what is on the device, to resume at its end."""
        if queued.end <= queued.on_device:
            return False
        tail = self._tail(queued.chain, queued.end, queued.on_device)
        return self.restorable_pages(queued.chain) < queued.end or not all(map(self.trailing.is_restorable, tail))

    def _find_end(self, chain: Chain, on_device: int) -> int:
        # A prefix that is on the device is in use, so its copy here is kept as well.
        pages = self.restorable_pages(chain)
        return next(self.held_ends(chain, pages, on_device), 0) or next(self.held_ends(chain, pages), 0)

    def _lost_tokens(self, chain: Chain, loadable: int, pages: int, on_device: int) -> int:
        """Tokens to recompute if nothing more is fetched: the request then resumes at the last loadable end."""
        return (
            pages - max(next(self.ends(chain, loadable, on_device), 0), min(on_device, pages))
        ) * self.layout.page_size

    def _per_page(self, tokens: int, pages: int) -> int:
        return max(self.layout.page_size, tokens // max(1, pages))

    def _wait_for_tail(self, request: str, tail: Sequence[PageKey], lost: int) -> dict[str, Chain]:
        """`request` needs `tail` from the trailing store; returns its parts, see `Queued`."""
        queued = self.queued.get(request)
        if queued is not None and queued.tail == tail:
            parts = queued.parts
        else:
            self._leave_tail(queued)
            parts = dict(self._named(request, tail))
        for name, chain in parts.items():
            self.trailing.mark_used(chain.keys[-1])
            missing = len(chain.keys) - self.trailing.loadable_pages(chain)
            self.trailing.arrive(name, chain, self._per_page(lost, missing), 0 if lost else len(chain.keys))
        return parts

    def _named(self, request: str, keys: Sequence[PageKey]) -> Iterator[tuple[str, Chain]]:
        return zip(self._names(request), self.trailing.chains(keys), strict=False)

    @staticmethod
    def _names(request: str) -> Iterator[str]:
        return (f"{request} {place}" for place in count())

    def is_ready(self, request: str, may_give_up: bool = True) -> bool:
        if not super().is_ready(request, may_give_up):
            return False
        queued = self.queued.get(request)
        if queued is None or self._migration.gave_up(request):
            return True
        if not self.trailing.has_sought(request, may_give_up):
            return False
        if not all(self.trailing.is_ready(name, may_give_up) for name in queued.parts):
            return False
        if self._has_lost(queued):
            self._find_again(request)
            return False
        return True

    def reorder(self, requests: Sequence[str]) -> None:
        super().reorder(requests)
        waiting = map(self.queued.get, self._pages.waiting.requests)
        self.trailing.reorder([name for queued in waiting if queued is not None for name in queued.parts])

    def leave(self, request: str) -> None:
        super().leave(request)
        self._leave_tail(self.queued.pop(request, None))
        self.trailing.stop_seeking(request)

    def _leave_tail(self, queued: Queued | None) -> None:
        for name in queued.parts if queued is not None else ():
            self.trailing.leave(name)

    def _remove(self, keys: Sequence[PageKey]) -> int:
        removed = super()._remove(keys)
        self.trailing.forget([key for key in keys if not self.holds(key)])
        return removed

    def prefill_took(self, tokens: int, seconds: float) -> None:
        super().prefill_took(tokens, seconds)
        self.trailing.prefill_took(tokens, seconds)

    def reserve_tail(self, request: str, chain: Chain, end: int, on_device: int = 0) -> None:
        """Pin what is needed from the trailing store to resume at `end`, one of `ends`, until `end_pass`."""
        for name, part in self._named(request, self._tail(chain, end, on_device)):
            self.trailing.reserve(name, part)

    def end_pass(self) -> None:
        super().end_pass()
        self.trailing.end_pass()

    # Loading

    def queue_tail(
        self,
        request: str,
        keys: Sequence[PageKey],
        device_slots: torch.Tensor,
        indices_ready: Sequence[Event] | None = None,
    ) -> bool:
        """`queue_load` for what `reserve_tail` reserved.

        Args:
            device_slots: `[len(keys) * trailing page size]`, integer; slots of the trailing store's own pool.
        """
        size, first = self.trailing.layout.page_size, 0
        for name, chain in self._named(request, keys):
            end = first + len(chain.keys)
            if not self.trailing.queue_load(
                name, chain.keys, device_slots[first * size : end * size], indices_ready
            ):
                self._cancel_tail(request)
                return False
            first = end
        return True

    def start_tail_load(self, batch: int, after: Sequence[Event] = ()) -> LayerWiseLoad:
        """`start_load` for what `queue_tail` queued; to be called with every `start_load`."""
        return self.trailing.start_load(batch, after)

    def _cancel_tail(self, request: str) -> None:
        for name in self._names(request):
            if not self.trailing.cancel_load(name):
                break

    def cancel_load(self, request: str) -> bool:
        self._cancel_tail(request)
        return super().cancel_load(request)

    def finish_load(self, batch: int, stream: Any = None) -> bool:
        landed = self.trailing.finish_load(batch, stream)
        return super().finish_load(batch, stream) and landed

    # Saving

    def save(self, run: PageRun | None, after: Sequence[Event] = (), trailing: PageRun | None = None) -> None:
        """Save pages, their trailing part, or both; the device pages must stay unchanged until reported."""
        self._saved.append(_Saved(run is not None, trailing is not None))
        if run is not None:
            super().save(run, after)
        if trailing is not None:
            self.trailing.save(trailing, after)

    def poll(self) -> int:
        pages, trailing, finished = super().poll(), self.trailing.poll(), 0
        for request in self.trailing.found():
            self._find_again(request)
        for saved in self._saved:
            pages -= saved.pages
            trailing -= saved.trailing
            if pages < 0 or trailing < 0:
                break
            finished += 1
        return finished

    @property
    def saving(self) -> int:
        return super().saving + self.trailing.saving

    def pop_save(self) -> bool:
        saved = self._saved.popleft()
        pages_are_whole = not saved.pages or super().pop_save()
        return (not saved.trailing or self.trailing.pop_save()) and pages_are_whole

    # Life and death

    def wait_for_device(self) -> None:
        super().wait_for_device()
        self.trailing.wait_for_device()

    def flush(self, timeout: float) -> int:
        # KV and trailing pages are useless without each other, so each gets its share of the time.
        until = time.monotonic() + timeout
        self.trailing.flush(timeout / 2)
        left = super().flush(max(0.0, until - time.monotonic()))
        return left + self.trailing.flush(max(0.0, until - time.monotonic()))

    def reset(self) -> None:
        super().reset()
        self.trailing.reset()

    def detach_disk(self) -> None:
        super().detach_disk()
        self.trailing.detach_disk()

    def _start_empty(self, epoch: int) -> None:
        super()._start_empty(epoch)
        self.queued.clear()
        self._saved.clear()

    def close(self) -> None:
        super().close()
        self.trailing.close()

    def check_invariants(self) -> None:
        super().check_invariants()
        self.trailing.check_invariants()
