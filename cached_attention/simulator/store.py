"""What `CachedAttentionStore` does with pages, using the same classes, without data."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

from cached_attention import admission
from cached_attention.chain import Chain
from cached_attention.config import DEFAULT_LOOK_AHEAD
from cached_attention.hierarchy import Hierarchy
from cached_attention.index import PageKey
from cached_attention.migration.disk_write_behind import DiskWriteBehind
from cached_attention.migration.fetch import Fetch
from cached_attention.migration.fetch_source import DiskSource
from cached_attention.migration.look_ahead import LookAhead
from cached_attention.policy.eviction import EvictionOrder
from cached_attention.policy.waiting import WaitOrRecompute
from cached_attention.reach import Reach
from cached_attention.simulator.cost import Cost
from cached_attention.simulator.disk import SimulatedDisk
from cached_attention.simulator.policies import LeafOrder, MakeOrder, Policy
from cached_attention.simulator.request import Hits, Request
from cached_attention.stats import Reason
from cached_attention.tiers.host_slots import HostSlots

TICK = 1e-6
"""Seconds of virtual time between two uses, so that no two pages are equally cold."""
EXPIRED_AT_ONCE = 64
UNPROTECTED_WINDOW = 16
"""Waiting requests fetched for ahead of time by policies that do not protect wanted pages on disk."""
REFRESHED = 128
"""Waiting requests whose prefixes SGLang keeps recent."""
REFRESH_INTERVAL = 32
"""Scheduling passes between refreshes."""


class SimulatedStore:
    """Pages in host memory and on disk under one policy.

    Args:
        host_pages: capacity of host memory.
        disk_pages: capacity of the disk; 0: no disk.
        page_tokens: tokens per page.
        ttl: seconds since its last use after which a page is dropped.
    """

    def __init__(
        self,
        policy: Policy,
        order: MakeOrder,
        host_pages: int,
        disk_pages: int = 0,
        *,
        page_tokens: int,
        cost: Cost,
        clock: Callable[[], float],
        ttl: float = math.inf,
        look_ahead: int = DEFAULT_LOOK_AHEAD,
    ) -> None:
        self.policy = policy
        self._clock = clock
        self._page_tokens = page_tokens
        self._ttl = ttl
        self._time = 0.0
        self._passes = 0
        capacities = {"host": host_pages, "disk": disk_pages}
        self.pages = Hierarchy(
            HostSlots(host_pages),
            has_disk=disk_pages > 0,
            order=lambda index, tier, waiting, next_use: (
                EvictionOrder(index, tier, waiting, next_use)
                if policy.learns
                else order(index, tier, waiting, capacities[tier.name])
            ),
        )
        self._reach = Reach(self.pages)
        both = (self.pages.host_order, self.pages.disk_order)
        self._baselines = [one for one in both if isinstance(one, LeafOrder)]
        self.decision = WaitOrRecompute()
        self.declined = 0
        """Pages for which host memory had no room."""
        self._chains: dict[str, Chain] = {}
        self._asked: dict[str, int] = {}
        """Pages of the prompt that were restorable when the disk was last asked."""
        self._in_time: dict[str, int] = {}
        """Pages that were in host memory when the request was first due to run."""
        self._awaited: dict[PageKey, list[str]] = {}
        """Waiting requests by the first page they lack."""
        self.disk: SimulatedDisk | None = None
        if disk_pages:
            self.disk = SimulatedDisk(disk_pages, cost, clock)
            self._fetch = Fetch(
                self.pages, DiskSource(self.pages, self.disk, self.decision.fetching), clock=clock
            )
            # Other policies fetch when the request is first due to run.
            window = look_ahead if policy.looks_ahead else UNPROTECTED_WINDOW if policy.fetches_ahead else 1
            self._ahead = LookAhead(self.pages, self._fetch, self.decision, window, page_tokens, clock)
            self._write_behind = DiskWriteBehind(self.pages, self.disk, min_uses=1)

    def _now(self) -> float:
        """The clock's time, but later than any time recorded before."""
        self._time = max(self._clock(), self._time + TICK)
        return self._time

    # The waiting queue

    def arrive(self, request: Request) -> None:
        """Append `request` to the waiting queue."""
        self._chains[request.name] = Chain(list(request.prompt_keys))
        if self.policy.learns:
            self.pages.note_prompt(request.name, request.prompt_keys, self._now())
        self.pages.waiting.append(request.name)
        if self.policy.looks_ahead:
            self._want(request.name)
        if self.policy.fetches_ahead:
            self._ask(request.name)

    def _want(self, name: str) -> None:
        """Keep the pages that `name` will ask for, and further ones as soon as they exist."""
        chain = self._chains[name]
        if restorable := self._reach.restorable(chain):
            self.pages.want(name, self.pages.index.find(chain.keys[restorable - 1]))
        if restorable < len(chain.keys):
            self._awaited.setdefault(chain.keys[restorable], []).append(name)

    def _ask(self, name: str) -> None:
        """Fetch from disk what host memory lacks."""
        chain = self._chains[name]
        restorable = self._reach.restorable(chain)
        if self.disk is None or self._asked.get(name) == restorable:
            return
        if self._asked.get(name, 0) > restorable:
            self._ahead.leave(name)  # Part of it has left the disk.
        self._asked[name] = restorable
        if restorable > (loadable := self._reach.loadable(chain)):
            self._ahead.prefetch(name, chain.keys[:restorable], loadable)

    def restorable_pages(self, request: Request) -> int:
        """Leading pages of the prompt of the waiting `request` that are in some tier."""
        return self._reach.restorable(self._chains[request.name])

    def reorder(self, requests: Sequence[Request]) -> None:
        """Set the order in which the waiting requests will run."""
        self.pages.waiting.replace([request.name for request in requests])

    def is_ready(self, request: Request) -> bool:
        """Whether no fetch for `request` is in progress, or recomputing is expected to be faster."""
        if self.disk is None:
            return True
        if request.name not in self._in_time:
            self._in_time[request.name] = self._reach.loadable(self._chains[request.name])
            self._ask(request.name)
            self._ahead.advance()
        return self._ahead.is_ready(request.name)

    def prefill_took(self, tokens: int, seconds: float) -> None:
        self.decision.computing.observe(tokens, seconds)

    # Loading and saving

    def load(self, request: Request, on_device: int = 0) -> Hits:
        """Record the use of the pages that `request`, which runs now, finds; `on_device` pages need no load."""
        index = self.pages.index
        chain = self._chains[request.name]
        loadable = self._reach.loadable_exactly(chain)
        hits = self._hits(request.name, on_device, loadable)
        for order in self._baselines:
            order.begin(request)
        now = self._now()
        for row in [index.find(key) for key in chain.keys[:loadable]]:
            index.uses[row] += 1
            index.last_use[row] = now
            self.pages.mark_dirty(row)
            for order in self._baselines:
                if row in order.tier:
                    order.used(row)
        self.leave(request)
        return hits

    def _hits(self, name: str, on_device: int, loadable: int) -> Hits:
        if self.disk is None:
            return Hits(on_device, max(0, loadable - on_device))
        first, fetched, _ = self._fetch.span(name)
        in_time = max(on_device, min(loadable, self._in_time.get(name, loadable)))
        late = max(0, loadable - in_time)
        ahead = max(0, min(in_time, first + fetched) - max(first, on_device)) if fetched else 0
        return Hits(on_device, max(0, loadable - on_device) - late - ahead, ahead, late)

    def leave(self, request: Request) -> None:
        """`request` runs: release everything held for it."""
        del self._chains[request.name]
        self._asked.pop(request.name, None)
        self._in_time.pop(request.name, None)
        self.pages.unwant(request.name, self._clock())
        if self.disk is not None:
            self._ahead.leave(request.name)

    def save(self, keys: Sequence[PageKey]) -> None:
        """Save the pages `keys`, in prompt order, which were computed or loaded."""
        parent: PageKey | None = None
        now = self._now()
        for place, key in enumerate(keys):
            if not self.pages.is_kept(key) and self._admit(key, parent, place) is None:
                self.declined += len(keys) - place
                return
            row = self.pages.index.find(key)
            self.pages.index.last_use[row] = now
            parent = key

    def _admit(self, key: PageKey, parent: PageKey | None, place: int) -> int | None:
        if not all(order.admits(key) for order in self._baselines if order.tier is self.pages.in_host):
            return None
        row = admission.admit(self.pages, key, parent, place * self._page_tokens)
        if row is None:
            return None
        self.pages.index.uses[row] = 1
        self.pages.index.last_use[row] = self._time
        self.pages.land(row, clean=False)
        self.pages.unpin(row)
        for name in self._awaited.pop(key, ()):
            if name in self._chains:
                self._want(name)
                if self.policy.fetches_ahead:
                    self._ask(name)
        return row

    # Time

    def poll(self) -> None:
        """Do what the engine does in every scheduling pass."""
        if self.disk is not None:
            self.disk.advance()
            self._fetch.poll()
            if self.policy.fetches_ahead and not self.policy.looks_ahead:
                for name in self.pages.waiting.requests[:UNPROTECTED_WINDOW]:
                    self._ask(name)
            self._ahead.advance()
            self._write_behind.poll(self._fetch.is_reading, self._fetch.held)
        if self._ttl < math.inf:
            self._expire(self._clock() - self._ttl)
        if self.policy.refreshes:
            if self._passes % REFRESH_INTERVAL == 0:
                self._refresh_prefixes()
            self._passes += 1

    def _expire(self, limit: float) -> None:
        admission.expire(self.pages, EXPIRED_AT_ONCE, limit)
        if self.disk is not None:
            self.disk.remove(admission.evict_from_disk(self.pages, EXPIRED_AT_ONCE, limit, Reason.TTL))

    def _refresh_prefixes(self) -> None:
        """From the end of the queue to its head, so that the head's prefix is the most recent."""
        index = self.pages.index
        for name in reversed(self.pages.waiting.requests[:REFRESHED]):
            chain = self._chains[name]
            for key in chain.keys[: self._reach.loadable(chain)]:
                index.last_use[index.find(key)] = self._now()

    def next_event(self) -> float:
        """Time of the disk's next completion; infinity if it is idle."""
        return math.inf if self.disk is None else self.disk.next_event()

    def check_invariants(self) -> None:
        """Scans everything."""
        self.pages.check_invariants()
