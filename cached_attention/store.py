"""The façade that an engine drives: look up, look ahead, load, save.

One thread, the engine's scheduler, calls the store. None of its calls waits for a transfer except `reset`,
`replace_disk`, `detach_disk`, `wait_for_device`, `flush`, `close` and, without a GPU, `finish_load`.
Transfers run on streams of their own; `poll` takes note of those that have ended.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch

from cached_attention import admission
from cached_attention.aliases import Aliases, Source
from cached_attention.awaited_saves import AwaitedSaves
from cached_attention.chain import Chain, PageRun
from cached_attention.clock import EpochClock
from cached_attention.config import DEFAULT_LOOK_AHEAD, Eviction, Wait
from cached_attention.hierarchy import Hierarchy
from cached_attention.hints import Hints
from cached_attention.index import NOWHERE, PageKey
from cached_attention.layout import DevicePool
from cached_attention.loading import Loads
from cached_attention.migration.fetch import FetchedSpan
from cached_attention.migration.lookups import Lookups
from cached_attention.migration.migration import Migration
from cached_attention.outlooks import Outlooks
from cached_attention.policy.waiting import WaitOrRecompute
from cached_attention.position.rotation import Rotation
from cached_attention.reach import Reach
from cached_attention.residency import ResidencyFeed
from cached_attention.saving import Saves
from cached_attention.stats import Reason, StoreStats
from cached_attention.tiers.disk import DiskTier
from cached_attention.tiers.host import HostTier
from cached_attention.tiers.remote import RemoteTier
from cached_attention.transfer.copier import page_copier
from cached_attention.transfer.jobs import Transfers
from cached_attention.transfer.layer_wise_load import LayerWiseLoad
from cached_attention.transfer.streams import Event
from cached_attention.uses import Uses

EXPIRED_AT_ONCE = 64
"""Pages per tier and poll that are dropped because they were not used for too long."""
PATIENCE = 10.0
"""Seconds that the store waits for a tier before it goes on without it."""


class CachedAttentionStore:
    """A hierarchy of page records under one device pool, for one rank.

    The store is closed under prefixes: a page is admitted only after its predecessor and evicted only after
    its successors. So one number says how much of a prompt can be restored, and a pin on the last page protects
    the whole chain.

    Args:
        device: the engine's KV pool.
        host_size: bytes of host memory, at least one page.
        disk: a tier that has been opened, with its pages; the store closes it.
        remote: a new tier shared with other servers; the store opens and closes it.
        rotations: per layer how its keys are rotated, None for layers without rotation. Without `rotations`,
            pages are loaded at their own position only.
        min_uses: write a page to disk after this many uses.
        ttl: drop pages this many seconds after their last use; None: never.
        look_ahead: number of queued requests whose pages are fetched before they run; at least 1.
        wait: how long a request waits for pages from disk and remote store.
        eviction: order in which pages that no queued request needs leave host memory.
        chain_pages: start a new chain after this many pages, so that later pages of a prompt can be kept without
            the earlier ones; None: one chain per prompt. See `TrailingStore`.
        clock: seconds since the epoch; `EpochClock` unless given.

    Raises:
        ValueError: `host_size` holds no page, or keys of this dtype or shape cannot be rotated.
    """

    _lookup_type: type[Lookups] = Lookups

    def __init__(
        self,
        device: DevicePool,
        host_size: int,
        disk: DiskTier | None = None,
        remote: RemoteTier | None = None,
        *,
        rotations: Sequence[Rotation | None] | None = None,
        min_uses: int = 1,
        ttl: float | None = None,
        look_ahead: int = DEFAULT_LOOK_AHEAD,
        wait: Wait = Wait.MEASURED,
        eviction: Eviction = Eviction.LEARNT,
        chain_pages: int | None = None,
        clock: Callable[[], float] | None = None,
    ) -> None:
        self.layout = device.layout
        self.host = HostTier(self.layout, host_size, device.device)
        self.disk = disk
        self.remote = remote
        self.stats = StoreStats()
        self._min_uses = min_uses
        self._ttl = ttl
        self._look_ahead = look_ahead
        self._chain_pages = chain_pages
        self._clock = clock or EpochClock()
        self._decision = WaitOrRecompute(always=wait is Wait.COMPLETE)
        self._learns = eviction is Eviction.LEARNT
        self._can_rotate = rotations is not None
        self._device_pages = device.num_pages
        copier = page_copier(device, self.host, rotations)
        self._transfers = Transfers(copier, self.host, device.device, self.layout.page_size)
        self.residency = ResidencyFeed()
        if remote is not None:
            remote.open(self.host)
        self._start_empty(epoch=0)
        self._adopt()

    def _start_empty(self, epoch: int) -> None:
        page_size, has_disk, has_remote = self.layout.page_size, self.disk is not None, self.remote is not None
        self._pages = Hierarchy(
            self.host, has_disk=has_disk, has_remote=has_remote, feed=self.residency, stats=self.stats
        )
        # It changes only while host memory is empty: pages that were saved before would have none.
        self._transfers.checksums = has_disk or has_remote
        self._pages.epoch = epoch
        self._pages.is_closed = self._chain_pages is None
        self._index, self._in_host = self._pages.index, self._pages.in_host
        self._reach = Reach(self._pages)
        self._migrate()
        self._aliases = Aliases(self._pages, page_size, self._device_pages)
        self._outlooks = Outlooks(self._pages, self.arrive, self.leave, self._remove, self._clock, self._ttl)
        self._saves = Saves(
            self._pages, self._transfers, self._aliases, self.stats, page_size, self._clock, self._chain_pages
        )
        self._awaited_saves = AwaitedSaves(self._pages, self._clock)
        self._loads = Loads(self._pages, self._transfers, self._aliases, self.stats)

    def _migrate(self) -> None:
        self._uses = Uses(self._pages, self.disk, self._min_uses, self._clock)
        self._migration = Migration(
            self._pages,
            self.disk,
            self.remote,
            self._decision,
            look_ahead=self._look_ahead,
            min_uses=self._min_uses,
            page_tokens=self.layout.page_size,
            lookups=self._lookup_type,
            on_found=self._found,
        )

    def _found(self, request: str, keys: Sequence[PageKey]) -> None:
        """Pages of the chain `keys` of the queued `request` were found in the remote store."""
        self._migration.prefetch_found(request, keys)

    @property
    def resident_pages(self) -> int:
        """Pages in host memory, including those still being written to it."""
        return self._in_host.pages

    def counters(self) -> dict[str, int]:
        """Counts and fill levels, in pages."""
        return self.stats.counters() | self._pages.counters() | self._migration.counters()

    @property
    def pins(self) -> int:
        """Number of pins: one per reservation, per load, and per page on its way to host memory."""
        return sum(self._index.pins)

    @property
    def saving(self) -> int:
        """Number of saves that have not ended."""
        return self._saves.in_flight

    # Looking up

    def restorable_pages(self, chain: Chain) -> int:
        """Number of leading pages of `chain` that are in some tier. Constant time if nothing changed."""
        return self._reach.restorable(chain)

    def loadable_pages(self, chain: Chain) -> int:
        """Number of leading pages of `chain` that are in host memory. Constant time if nothing changed."""
        return self._reach.loadable(chain)

    def alias(self, chain: Chain, sources: Iterable[Source]) -> None:
        """Alias pages of `chain` that the store lacks to pages of the same tokens at other positions.

        Aliases share the bytes and are rotated when they are loaded. Does nothing if the model's keys cannot be
        rotated.

        Args:
            sources: candidate positions, nearest first. Each has, per page of the chain, the key of the page with
                the same tokens there, or None. They are consumed lazily, only as far as needed.
        """
        if self._can_rotate:
            self._aliases.extend(chain.keys, sources)

    def left_device(self, keys: Sequence[PageKey]) -> None:
        """The pages `keys` are not on the device; they will be loaded, or computed at their own positions."""
        self._aliases.left_device(keys)

    def holds(self, key: PageKey) -> bool:
        """Whether the page is in some tier of this server."""
        return self._pages.holds(key)

    def is_followed(self, key: PageKey) -> bool:
        """Whether a successor of the page is in some tier of this server."""
        return self._pages.is_followed(key)

    # The waiting queue

    def arrive(self, request: str, chain: Chain, page_tokens: int | None = None, on_device: int = 0) -> int:
        """`request` with the prompt `chain` is queued, for now behind all others; returns its restorable pages.

        Its pages are kept, and fetched into host memory in the order of the queue. Cheap if it was called before
        and nothing changed.

        Args:
            page_tokens: tokens to compute per page that is not restored; the page size unless given.
            on_device: leading pages that are on the device. If all restorable pages are, nothing is fetched.
        """
        pages = self.restorable_pages(chain)
        return self._wait_for(request, chain, pages, page_tokens or self.layout.page_size, on_device)

    def _wait_for(self, request: str, chain: Chain, pages: int, page_tokens: int, on_device: int) -> int:
        """`request` is queued and needs the first `pages` of `chain`, which are in some tier."""
        loadable = min(self.loadable_pages(chain), pages)
        if self._learns and request not in self._pages.waiting and not Hints.is_name(request):
            self._pages.note_prompt(request, chain.keys, self._clock())
        self._pages.waiting.append(request)
        if pages:
            self._pages.want(request, self._pages.last_row(chain.keys[:pages]))
        self._migration.arrive(request, chain.keys, loadable, pages, page_tokens, on_device)
        return pages

    def await_saves(self, request: str, keys: Sequence[PageKey]) -> None:
        """Hold the queued `request` until those of the pages `keys` that are being saved can be loaded.

        For truncated prompts: the pages that are being saved are on the device, but at other positions. The hold
        ends when recomputing them would have taken as long.
        """
        page_tokens, seconds = self.layout.page_size, self._decision.computing.seconds
        self._awaited_saves.hold(request, keys, lambda pages: seconds(pages * page_tokens))

    def is_ready(self, request: str, may_give_up: bool = True) -> bool:
        """Whether `request` may run: nothing is being fetched for it, or recomputing is expected to be faster.

        Args:
            may_give_up: False if the scheduler has not reached `request` yet. Then it is too early to give up its
                pages: they may arrive while other requests run.
        """
        return self._awaited_saves.has_landed(request) and self._migration.is_ready(request, may_give_up)

    def reorder(self, requests: Sequence[str]) -> None:
        """The queued requests in the order in which they will run; all others have left the queue."""
        for request in self._pages.waiting.replace([*requests, *self._outlooks.queued]):
            self.leave(request)

    def leave(self, request: str) -> None:
        """`request` runs or was aborted: release what is held for it."""
        self._pages.unwant(request, self._clock())
        self._awaited_saves.leave(request)
        self._migration.leave(request)

    def expect(self, chain: Chain, seconds: float) -> int:
        """The next turn of the conversation `chain` is expected in `seconds`; returns its restorable pages.

        It is queued behind all requests until it is loaded, or until `hints.GRACE` seconds after that time.
        """
        return self._outlooks.expect(chain, seconds)

    def keep(self, chain: Chain) -> int:
        """Evict the conversation `chain` last, for the time to live, or for an hour if there is none."""
        return self._outlooks.keep(chain)

    def drop(self, chain: Chain) -> int:
        """Remove the conversation `chain` from every tier; returns the number of pages removed.

        Pages that other conversations continue, or that a queued request needs, stay. Pages that are on their way
        between tiers are removed by later calls of `poll`, if they get there within `drops.DROPPING` seconds.
        """
        return self._outlooks.drop(chain)

    def _remove(self, keys: Sequence[PageKey]) -> int:
        """Remove the chain `keys` from every tier, except for pages in use; returns how many were removed."""
        return self._migration.drop(keys)

    def chain_to(self, *ends: PageKey) -> Chain:
        """The chain that ends with the first of the pages `ends` that is known; empty if none is."""
        known = (row for row in map(self._index.find, ends) if row != NOWHERE)
        return Chain(self._index.path(next(known, NOWHERE)))

    def tiers_with(self, key: PageKey) -> list[str]:
        """Names of the tiers that the page is in."""
        return self._pages.tiers_with(key)

    def prefill_took(self, tokens: int, seconds: float) -> None:
        """The engine computed `tokens` new tokens in `seconds`."""
        self._decision.computing.observe(tokens, seconds)

    def fetched_span(self, request: str) -> FetchedSpan:
        """What was fetched for `request` from the tiers below; known until it leaves the queue."""
        return self._migration.fetch.span(request)

    def reserve(self, request: str, chain: Chain) -> int:
        """Pin the loadable pages of `chain` until `end_pass`, so that a load cannot fail; returns how many."""
        self._loads.release(request)
        pages = self._reach.loadable_exactly(chain)
        if pages:
            row = self._index.find(chain.keys[pages - 1])
            self._uses.mark(row)
            self._loads.reserve(request, row)
        return pages

    def end_pass(self) -> None:
        """End of a scheduling pass: unpin what was reserved and not loaded."""
        self._loads.end_pass()

    # Loading

    def queue_load(
        self,
        request: str,
        keys: Sequence[PageKey],
        device_slots: torch.Tensor,
        indices_ready: Sequence[Event] | None = None,
    ) -> bool:
        """Queue the pages `keys` (consecutive, reserved in this pass) for the next `start_load`.

        Aliases are rotated to their position.

        Args:
            device_slots: `[len(keys) * page_size]`, integer; token slots that the load may write.
            indices_ready: events after which `device_slots` is computed; None: it is by the time the load starts.

        Returns:
            False, with nothing queued, if a page is not in host memory.

        Raises:
            ValueError: the request has a load queued already.
        """
        rows = self._loads.queue(request, keys, device_slots, indices_ready)
        if not rows:
            return False
        self._uses.count(rows)
        self.leave(request)
        self._outlooks.loaded(keys)
        return True

    def cancel_load(self, request: str) -> bool:
        """Release what is held for `request`, except a running load; False if no load was queued."""
        was_queued = self._loads.cancel(request)
        self.leave(request)
        return was_queued

    def ended(self, request: str) -> None:
        """`request` has ended: only the engine's own cache knows now which of its pages are on the device."""
        self.leave(request)
        self._aliases.ended(request)

    @property
    def has_queued_loads(self) -> bool:
        return self._loads.has_queued

    def start_load(self, batch: int, after: Sequence[Event] = ()) -> LayerWiseLoad:
        """Start all queued loads as `batch`; the forward may read layer l after `layers[l]` of the result.

        The copies wait for the events in `after`: forwards that may still use the slots, see `LayerWiseLoad`.
        """
        return self._loads.start(batch, after)

    def finish_load(self, batch: int, stream: Any = None) -> bool:
        """The forward of `batch` was launched: let `stream` wait for the remaining layers, see `Event.wait`.

        Returns False if the copies failed; the results of the forward are then invalid. The pages in host memory
        are unpinned when the copies have ended.
        """
        return self._loads.finish(batch, stream)

    # Saving

    def lacks_parent(self, run: PageRun) -> bool:
        """Whether the page before `run` is not in the store; `run` must then start earlier to be saved."""
        return self._saves.lacks_parent(run)

    def save(self, run: PageRun, after: Sequence[Event] = ()) -> None:
        """Start saving the pages of `run` that are not in the store; `poll` reports the outcome.

        Takes host slots immediately, evicting if necessary, and never waits: pages without a slot are declined.
        The copies wait for the events in `after`. The device pages must not change until the save is reported.
        """
        self._saves.start(run, after)

    def pop_save(self) -> bool:
        """Whether all pages of the oldest save that `poll` counted are in the store."""
        return self._saves.pop()

    def poll(self) -> int:
        """Process all transfers that have ended; returns the number of saves that wait for `pop_save`."""
        finished = self._saves.poll()
        self._loads.poll()
        if self._ttl is not None:
            limit = self._clock() - self._ttl
            admission.expire(self._pages, EXPIRED_AT_ONCE, limit)
            self._migration.expire(EXPIRED_AT_ONCE, limit)
        self._outlooks.poll(has_saved=finished > 0)
        self._migration.poll()
        return finished

    # Life and death

    def wait_for_device(self) -> None:
        """Wait until no transfer touches the device."""
        self._saves.wait()
        self._loads.wait()

    def flush(self, timeout: float) -> int:
        """Write dirty pages to disk for at most `timeout` seconds; returns the number not written."""
        self._saves.wait()
        self.poll()
        return self._migration.flush(timeout)

    def reset(self) -> None:
        """Remove every page from every tier of this server, after waiting for running transfers."""
        self._wait()
        self.stats.left("host", Reason.FLUSH, self._in_host.pages)
        self._migration.clear()
        self.host.clear()
        self._start_empty(epoch=self._pages.epoch + 1)

    def replace_disk(self, open_disk: Callable[[], DiskTier | None]) -> None:
        """Remove every page from host memory and continue with another disk tier; the old one keeps its pages."""
        self._wait()
        if self.disk is not None:
            self.disk.close()
        self.disk = open_disk()
        self.host.clear()
        self._start_empty(epoch=self._pages.epoch + 1)
        self._adopt()

    def detach_disk(self) -> None:
        """Continue without the disk tier, which keeps its pages; those in host memory stay. Walks all pages.

        Requests stop waiting for the disk, so this may be called while requests are queued or running.
        """
        if self.disk is None:
            return
        self._wait_for_tiers()
        self._pages.forget_disk()
        if self.disk is not None:
            self.disk.close()
        self.disk = None
        self._migrate()

    def _adopt(self) -> None:
        if self.disk is not None:
            self._pages.adopt(self.disk.record_columns(), self.disk.pages, self.disk.remove)

    def close(self) -> None:
        """Wait for running transfers and stop their threads; the disk keeps its pages."""
        self._wait()
        self._transfers.close()
        for tier in (self.disk, self.remote):
            if tier is not None:
                tier.close()
        if not self.host.retired:
            self.host.close()

    def _wait(self) -> None:
        self.wait_for_device()
        self._wait_for_tiers()

    def _wait_for_tiers(self) -> None:
        """Wait until no tier touches host memory; go on without those for which that takes too long."""
        if not (stuck := self._migration.wait(PATIENCE)):
            return
        self._migration.abandon(stuck, self.host, PATIENCE)
        self.disk = None if "disk" in stuck else self.disk
        self.remote = None if "remote" in stuck else self.remote
        self._migrate()

    def check_invariants(self) -> None:
        """Walk everything; for tests and debugging.

        Raises:
            AssertionError: a slot or pin leaked, or a count disagrees.
        """
        self._pages.check_invariants()
        holders = self._loads.pins + self._saves.pins + self._migration.pins
        assert self.pins == holders, f"{self.pins} pins for {holders} holders"
