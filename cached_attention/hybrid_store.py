"""A store for models that are not all attention: KV of some layers, and beside it states of the others."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

from cached_attention.chain import Chain, PageRun
from cached_attention.index import PageKey
from cached_attention.store import CachedAttentionStore
from cached_attention.transfer.streams import Event


class _Saved(NamedTuple):
    """What one save has. Each store reports its saves in their order."""

    pages: bool
    state: bool


class HybridStore(CachedAttentionStore):
    """Keeps KV page by page, and `states` where they were saved.

    A layer with linear attention or Mamba keeps one state per sequence, whatever its length. It cannot be cut: a
    conversation goes on from the end of a page whose state was saved, and needs the KV of all pages up to
    there. States lie in a store of their own, in which a page is one state and has the key of the KV page
    that it follows, and no page before it. What the queue will ask for is brought up in both; each evicts by
    itself.

    Args:
        states: made for the pool of states, without a remote tier. This store drives and closes it.
        options: as of `CachedAttentionStore`, which has the other arguments too; no remote tier.
    """

    def __init__(self, *args: Any, states: CachedAttentionStore, **options: Any) -> None:
        self.states = states
        self._wanted: dict[str, PageKey] = {}
        """The states that waiting requests were said to go on from."""
        self._end: int | None = None
        """Of the prompt that arrives."""
        self._saved: deque[_Saved] = deque()
        """The saves that have not been popped."""
        super().__init__(*args, **options)

    # Looking up

    def ends(self, chain: Chain, pages: int) -> Iterator[int]:
        """Of the prefixes of `chain` with up to `pages` pages those whose state can be loaded, longest first."""
        return self._ends(chain, pages, self.states.is_loadable)

    def held_ends(self, chain: Chain) -> Iterator[int]:
        """Of the prefixes of `chain` with KV in some tier those whose state is in one too, longest first."""
        return self._ends(chain, self.restorable_pages(chain), self.states.holds)

    def _ends(self, chain: Chain, pages: int, has_state: Callable[[PageKey], bool]) -> Iterator[int]:
        # Called for waiting requests in each pass, and most pages of a long prompt have no state.
        keys, known = chain.keys, self.states.known_pages
        return (end for end in range(pages, 0, -1) if keys[end - 1] in known and has_state(keys[end - 1]))

    def _usable(self, chain: Chain, pages: int) -> int:
        end = next(self._ends(chain, pages, self.states.holds), 0) if self._end is None else self._end
        return min(end, pages)

    def _page_tokens(self, chain: Chain, loadable: int, pages: int) -> int:
        # Without one page of KV the request goes on from the last state before it.
        lost = (pages - next(self.ends(chain, loadable), 0)) * self.layout.page_size
        return max(self.layout.page_size, lost // max(1, pages - loadable))

    # The waiting queue

    def arrive(self, request: str, chain: Chain, page_tokens: int | None = None, end: int | None = None) -> int:
        """See `CachedAttentionStore.arrive`; not in constant time, it looks for the last state of `chain`.

        Args:
            end: one of `held_ends` that is to be brought up; the longest unless given.
        """
        self._end = end
        pages = super().arrive(request, chain, page_tokens)
        self._end = None
        state = chain.keys[pages - 1] if pages else b""
        if self._wanted.get(request, b"") != state:
            self.states.leave(request)
        if pages:
            self._wanted[request] = state
            self.states.mark_used(state)
            kept = next(self.ends(chain, min(self.loadable_pages(chain), pages)), 0)
            saved = max(1, pages - kept) * self.layout.page_size
            self.states.arrive(request, Chain([state]), saved)
        return pages

    def is_ready(self, request: str, may_give_up: bool = True) -> bool:
        return super().is_ready(request, may_give_up) and self.states.is_ready(request, may_give_up)

    def reorder(self, requests: Sequence[str]) -> None:
        super().reorder(requests)
        self.states.reorder(self._pages.waiting.requests)

    def leave(self, request: str) -> None:
        super().leave(request)
        self._wanted.pop(request, None)
        self.states.leave(request)

    def drop(self, chain: Chain) -> int:
        dropped = super().drop(chain)
        for key in chain.keys:
            if key in self.states.known_pages and not self.holds(key):
                self.states.drop(Chain([key]))
        return dropped

    def prefill_took(self, tokens: int, seconds: float) -> None:
        super().prefill_took(tokens, seconds)
        self.states.prefill_took(tokens, seconds)

    def reserve_state(self, request: str, key: PageKey) -> None:
        """Keep the state at the end of the page `key`, one of `ends`, until `end_pass`."""
        self.states.reserve(request, Chain([key]))

    def end_pass(self) -> None:
        super().end_pass()
        self.states.end_pass()

    # Loading

    def cancel_load(self, request: str) -> bool:
        self.states.cancel_load(request)
        return super().cancel_load(request)

    def finish_load(self, batch: int, stream: Any = None) -> bool:
        landed = self.states.finish_load(batch, stream)
        return super().finish_load(batch, stream) and landed

    # Saving

    def save(self, run: PageRun | None, after: Sequence[Event] = (), state: PageRun | None = None) -> None:
        """Save pages, the state at the end of one, or both. They must stay as they are until it is reported."""
        self._saved.append(_Saved(run is not None, state is not None))
        if run is not None:
            super().save(run, after)
        if state is not None:
            self.states.save(state, after)

    def poll(self) -> int:
        pages, states, finished = super().poll(), self.states.poll(), 0
        for saved in self._saved:
            pages -= saved.pages
            states -= saved.state
            if pages < 0 or states < 0:
                break
            finished += 1
        return finished

    @property
    def saving(self) -> int:
        return super().saving + self.states.saving

    def pop_save(self) -> bool:
        saved = self._saved.popleft()
        pages_are_whole = not saved.pages or super().pop_save()
        return (not saved.state or self.states.pop_save()) and pages_are_whole

    # Life and death

    def flush(self, timeout: float) -> int:
        # Each is of no use without the other: half of the time for states, the rest for both.
        until = time.monotonic() + timeout
        self.states.flush(timeout / 2)
        left = super().flush(max(0.0, until - time.monotonic()))
        return left + self.states.flush(max(0.0, until - time.monotonic()))

    def reset(self) -> None:
        super().reset()
        self.states.reset()

    def detach_disk(self) -> None:
        super().detach_disk()
        self.states.detach_disk()

    def _start_empty(self, epoch: int) -> None:
        super()._start_empty(epoch)
        self._wanted.clear()
        self._saved.clear()

    def close(self) -> None:
        super().close()
        self.states.close()

    def check_invariants(self) -> None:
        super().check_invariants()
        self.states.check_invariants()
