"""Which page is in which tier, and in which order pages are evicted. Moves no bytes."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

from cached_attention.chain import reach
from cached_attention.index import NOWHERE, PageIndex, PageKey, Residency
from cached_attention.policy.demand import WaitingOrder
from cached_attention.policy.eviction import EvictionOrder
from cached_attention.policy.next_use import NextUse
from cached_attention.remote_pages import REMEMBERED, RemotePages
from cached_attention.residency import ResidencyFeed
from cached_attention.stats import Reason, StoreStats
from cached_attention.tiers.disk_rows import RecordColumns
from cached_attention.tiers.host_slots import HostSlots


class Hierarchy:
    """The index, the host slots, and the eviction order of each tier.

    A page can be in host memory, on disk, and `dirty`: in host memory and still to be written to disk. The host
    tier is closed under prefixes: a page enters it after its predecessor and leaves it after all its successors.
    Rows that share their bytes (see `PageIndex`) share a slot in each tier that they are in, and at most one of
    them is dirty.

    Args:
        order: creates the eviction order of host memory, and that of the disk.
        feed: notified of pages that become usable in a tier or leave it.
        stats: counts the pages that leave host memory, by reason.
    """

    def __init__(
        self,
        host: HostSlots,
        *,
        has_disk: bool,
        has_remote: bool = False,
        order: Callable[[PageIndex, Residency, WaitingOrder, NextUse], EvictionOrder] = EvictionOrder,
        feed: ResidencyFeed | None = None,
        stats: StoreStats | None = None,
    ) -> None:
        self.host = host
        self.feed = feed or ResidencyFeed()
        self.remote = RemotePages(max(REMEMBERED, 4 * host.capacity) if has_remote else 0, self.feed)
        """Pages in the remote store; they need no row in the index."""
        self.index = PageIndex("host", "disk", "dirty")
        self.in_host, self.on_disk, self.dirty = self.index.tiers
        self.waiting = WaitingOrder()
        self.next_use = NextUse(host.capacity)
        self.host_order = order(self.index, self.in_host, self.waiting, self.next_use)
        self.disk_order = order(self.index, self.on_disk, self.waiting, self.next_use)
        self.host_order.spared = self.dirty
        self.dirty_order = EvictionOrder(self.index, self.dirty, next_use=self.next_use)
        self.has_disk = has_disk
        self.is_closed = True
        """Whether a page is useless without its predecessor."""
        self.epoch = 0
        """Changes when pages are lost out of order: what is remembered about chains must be looked up again."""
        self.disorder = 0
        """Changes when a page becomes loadable before its predecessor: what is remembered about loadable pages
        may then count pages in between that have left."""
        self.feed.follow(self)
        self.stats = stats or StoreStats()

    def counters(self) -> dict[str, int]:
        """Counts and fill levels, in pages; `waiting` in requests."""
        return {
            "host_pages": self.host.capacity,
            "host_pages_used": self.in_host.pages,
            "aliases": self.stats.aliased,
            "waiting": len(self.waiting),
        }

    # Where pages are

    def is_kept(self, key: PageKey) -> bool:
        """Whether the page is in any tier of this server, or on its way there."""
        return self.index.is_resident(key)

    def tiers_with(self, key: PageKey) -> list[str]:
        """Names of the tiers that the page is in."""
        row = self.index.find(key)
        here = [tier.name for tier in (self.in_host, self.on_disk) if row != NOWHERE and row in tier]
        return [*here, "remote"] if key in self.remote else here

    def holds(self, key: PageKey) -> bool:
        """Whether the page is in a tier of this server."""
        row = self.index.find(key)
        return row != NOWHERE and (bool(self.in_host.ready[row]) or row in self.on_disk)

    def is_followed(self, key: PageKey) -> bool:
        """Whether a successor of the page is in a tier of this server, or on its way there."""
        row = self.index.find(key)
        return row != NOWHERE and any(tier.children[row] for tier in (self.in_host, self.on_disk))

    def is_known(self, key: PageKey) -> bool:
        """Whether the page is in any tier, or on its way there."""
        return self.index.is_resident(key) or key in self.remote

    def loadable(self, keys: Sequence[PageKey], known: int) -> int:
        """Number of leading pages that can be loaded from host memory; at the last call it was `known`."""
        find, ready = self.index.find, self.in_host.ready
        return reach(keys, known, lambda key: (row := find(key)) != NOWHERE and bool(ready[row]))

    def restorable(self, keys: Sequence[PageKey], known: int) -> int:
        """Number of leading pages that are in some tier; at the last call it was `known`."""
        find, ready, slot, remote = self.index.find, self.in_host.ready, self.on_disk.slot, self.remote
        return reach(
            keys,
            known,
            lambda key: (
                ((row := find(key)) != NOWHERE and (bool(ready[row]) or slot[row] != NOWHERE)) or key in remote
            ),
        )

    def last_row(self, keys: Sequence[PageKey]) -> int:
        """Row of the last of `keys` that has one; NOWHERE if none has."""
        return next((row for row in map(self.index.find, reversed(keys)) if row != NOWHERE), NOWHERE)

    # What is needed, by transfers and by queued requests

    def pin(self, row: int) -> None:
        self.index.pin(row)

    def unpin(self, row: int) -> None:
        self.index.unpin(row)
        self.offer(row)

    def offer(self, row: int) -> None:
        """Queue `row` for eviction if it has become evictable; called after any change that may have done so."""
        if row != NOWHERE and not self.index.pins[row]:
            for order in (self.host_order, self.disk_order, self.dirty_order):
                if order.tier.slot[row] != NOWHERE:
                    order.offer(row)

    def _is_idle(self, row: int) -> bool:
        """Whether the page is evictable from every tier it is in: no successors, no queued request, no pins."""
        unfollowed = not any(tier.children[row] for tier in self.index.tiers)
        wanted = any(order.demand.is_wanted(row) for order in (self.host_order, self.disk_order))
        return unfollowed and not wanted and not self.index.pins[row]

    def note_prompt(self, request: str, keys: Sequence[PageKey], now: float) -> None:
        """`request` with the prompt `keys` has arrived; must be called once per request."""
        find, kind = self.index.find, self.index.kind
        for key, known in zip(keys, self.next_use.asked(request, keys, now), strict=True):
            if (row := find(key)) != NOWHERE:
                kind[row] = known

    def want(self, request: str, row: int) -> None:
        """The queued `request` needs the pages up to `row`."""
        for order in (self.host_order, self.disk_order):
            order.demand.want(request, row)

    def unwant(self, request: str, now: float) -> None:
        """`request` has left the queue."""
        self.next_use.ran(request, now)
        for order in (self.host_order, self.disk_order):
            order.demand.forget(request)
        self.waiting.discard(request)

    # What becomes of a page in a tier

    def leads_to_disk(self, row: int) -> bool:
        """Whether pages on disk are reachable only through `row`, which is not there itself."""
        return row not in self.on_disk and self.on_disk.children[row] > 0

    def join(self, row: int) -> bool:
        """Put `row` into every tier that holds its bytes for another row; returns whether it is in any tier."""
        for tier in (self.in_host, self.on_disk):
            other = NOWHERE if row in tier else self.index.shares(row, tier)
            if other != NOWHERE:
                self.index.place(row, tier, tier.slot[other])
                tier.ready[row] = tier.ready[other]
                self.note_order(row)
                self.feed.entered(row, tier)
        self.offer(row)
        return row in self.in_host or row in self.on_disk

    def land(self, row: int, *, clean: bool) -> None:
        """The bytes of an admitted page have arrived; `clean`: they came from the disk."""
        for sharer in self.index.aliases.sharers(row):
            self.in_host.ready[sharer] = sharer in self.in_host
            self.note_order(sharer)
            self.feed.entered(sharer, self.in_host)
        if not clean:
            self.mark_dirty(row)
            self.remote.offer(self.index.key(self.index.aliases.origin(row)))

    def note_order(self, row: int) -> None:
        """`row` may have become loadable."""
        parent = self.index.parent[row]
        if parent != NOWHERE and not self.in_host.ready[parent]:
            self.disorder += 1

    def mark_dirty(self, row: int) -> None:
        """Queue the page in host memory for writing to disk, unless its bytes are there or already queued."""
        if not self.has_disk or row not in self.in_host or row in self.on_disk or row in self.dirty:
            return
        if self.index.shares(row, self.on_disk) != NOWHERE:
            self.join(row)
        elif self.index.shares(row, self.dirty) == NOWHERE:
            self.index.place(row, self.dirty, row)
            self.dirty_order.offer(row)

    def mark_clean(self, row: int) -> None:
        """The page need not be written to disk, or not any more."""
        if row in self.dirty:
            self._leave(row, self.dirty_order)
            if not self.index.pins[row]:
                self.host_order.offer(row)

    def leave_host(self, row: int) -> None:
        if self.leads_to_disk(row):
            self.epoch += 1  # Its successors on disk are out of reach until it is recomputed.
        self.index.pin(row)
        was_dirty = row in self.dirty
        self.mark_clean(row)
        slot, other = self._leave(row, self.host_order), self.index.shares(row, self.in_host)
        if other == NOWHERE:
            self.host.give_back(slot)
        elif was_dirty:
            self.mark_dirty(other)
        self.index.unpin(row)

    def settle_on_disk(self, row: int, slot: int) -> list[int]:
        """The bytes of `row` have been written to `slot` on disk, for it and for its sharers in host memory.

        Returns the disk slots to free: `slot`, if a sharer was written at the same time.
        """
        if row in self.on_disk:
            return [slot]
        for sharer in self.index.aliases.sharers(row):
            if sharer in self.in_host:
                self.mark_clean(sharer)  # It was used again while it was being written.
                self.index.place(sharer, self.on_disk, slot)
                self.feed.entered(sharer, self.on_disk)
                self.offer(sharer)
        return []

    def leave_disk(self, row: int) -> list[int]:
        """Take the page off the disk; returns the disk slots that this frees, at most one, for the disk tier."""
        if row not in self.in_host and self.in_host.children[row]:
            self.epoch += 1  # Its successors in host memory are out of reach until it is recomputed.
        self.index.pin(row)
        slot = self._leave(row, self.disk_order)
        freed = [slot] if self.index.shares(row, self.on_disk) == NOWHERE else []
        for sharer in self.index.aliases.sharers(row) if freed else ():
            self.mark_dirty(sharer)
        self.unpin(row)
        return freed

    def forget(self, row: int) -> list[int]:
        """A client said that the page is no longer needed: drop it. Returns the disk slots that this frees."""
        slots: list[int] = []
        if row in self.in_host:
            self.leave_host(row)
            self.stats.left("host", Reason.HINT, 1)
        if row in self.on_disk:
            slots = self.leave_disk(row)
            self.stats.left("disk", Reason.HINT, 1)
        return slots

    def give_up(self, row: int) -> None:
        """The bytes of an admitted page will never arrive."""
        self.epoch += 1
        for sharer in list(self.index.aliases.sharers(row)):
            if sharer in self.in_host and not self.in_host.ready[sharer]:
                self.leave_host(sharer)

    def lose(self, row: int) -> list[int]:
        """The record of `row` on disk is damaged: drop it for all sharers; returns the disk slots freed."""
        self.epoch += 1
        slots: list[int] = []
        for sharer in list(self.index.aliases.sharers(row)):
            if sharer in self.on_disk:
                slots += self.leave_disk(sharer)
        return slots

    # Many pages at once

    def adopt(self, records: Iterable[RecordColumns], count: int, remove: Callable[[list[int]], None]) -> None:
        """Add the `count` pages that the disk held when it was opened; `remove` gets the slots of duplicates."""
        self.index.reserve(count)
        twice: list[int] = []
        for some in records:
            twice += self.index.place_many(self.on_disk, *some)
        self.feed.adopted = len(self.index.keys)
        for row in self.index.leaves(self.on_disk):
            self.disk_order.offer(row)
        remove(twice)

    def forget_disk(self) -> None:
        """Continue without the disk tier, which keeps its pages. Walks all rows."""
        self.has_disk = False
        for row in self.rows_on_disk():
            self.leave_disk(row)
        for row in [row for row in self.index.rows() if row in self.dirty]:
            self.mark_clean(row)
        self.epoch += 1

    def rows_on_disk(self) -> list[int]:
        """Walks all rows."""
        return [row for row in self.index.rows() if row in self.on_disk]

    def drop(self, keys: Sequence[PageKey]) -> tuple[int, list[int]]:
        """Remove the chain from every tier of this server, tail first, until it reaches a page that is needed.

        Returns the number of pages removed, and the disk slots that this frees.
        """
        dropped, slots = 0, list[int]()
        for key in reversed(keys):
            row = self.index.find(key)
            if row == NOWHERE:
                continue
            if not self._is_idle(row):
                break
            dropped += 1
            slots += self.forget(row)
        return dropped, slots

    def _leave(self, row: int, order: EvictionOrder) -> int:
        """Remove `row` from the tier of `order`; returns its slot there."""
        parent = self.index.parent[row]
        order.demand.left(row)
        self.feed.leaves(row, order.tier)
        slot = self.index.displace(row, order.tier)
        if parent != NOWHERE:
            order.offer(parent)
        return slot

    def check_invariants(self) -> None:
        """Walks everything; raises AssertionError if a count, slot or link disagrees."""
        self.index.check_invariants()
        for order in (self.host_order, self.disk_order):
            order.demand.check_invariants()
            for row in self.index.leaves(order.tier):
                due = not self.index.pins[row] and not order.demand.is_wanted(row)
                assert order.has_queued(row) or not due, "a page can be evicted, and never will be"
        rows = [row for row in self.index.rows() if row in self.in_host]
        self.host.check_invariants({self.in_host.slot[row] for row in rows})
        for row in self.index.rows():
            assert row not in self.dirty or (row in self.in_host and row not in self.on_disk)
        for row in rows:
            pinned = any(self.index.pins[sharer] for sharer in self.index.aliases.sharers(row))
            assert self.in_host.ready[row] or pinned, "a page without bytes can be evicted"
            assert sum(sharer in self.dirty for sharer in self.index.aliases.sharers(row)) <= 1
            parent = self.index.parent[row]
            first = parent == NOWHERE and (not self.index.position[row] or self.index.aliases.origin(row) != row)
            closed = first or parent in self.in_host or parent in self.on_disk
            assert closed or self.epoch or not self.is_closed, (
                "a page is in host memory without the one before it"
            )
