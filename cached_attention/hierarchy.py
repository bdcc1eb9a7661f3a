"""Which page is in which tier, and which goes when room is needed. Moves no bytes."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

from cached_attention.index import NOWHERE, PageIndex, PageKey, Residency
from cached_attention.policy.demand import WaitingOrder
from cached_attention.policy.eviction import NOT_WAITING, EvictionOrder
from cached_attention.policy.next_use import NextUse
from cached_attention.tiers.disk_index import DiskRecord
from cached_attention.tiers.host_slots import HostSlots


class Hierarchy:
    """The index, the host slots, and the order of eviction of each tier.

    Three columns of residency: in host memory, on disk, and `dirty`: in host memory, wanted on disk and
    not there. The host tier is closed under prefixes: a page enters it after the page before it and
    leaves after all that follow it.

    Args:
        order: makes the order in which pages leave host memory, and that in which they leave the disk.
    """

    def __init__(
        self,
        host: HostSlots,
        *,
        has_disk: bool,
        order: Callable[[PageIndex, Residency, WaitingOrder, NextUse], EvictionOrder] = EvictionOrder,
    ) -> None:
        self.host = host
        self.index = PageIndex("host", "disk", "dirty")
        self.in_host, self.on_disk, self.dirty = self.index.tiers
        self.waiting = WaitingOrder()
        self.next_use = NextUse()
        self.host_order = order(self.index, self.in_host, self.waiting, self.next_use)
        self.disk_order = order(self.index, self.on_disk, self.waiting, self.next_use)
        self.dirty_order = EvictionOrder(self.index, self.dirty, next_use=self.next_use)
        self.has_disk = has_disk
        self.epoch = 0
        """Changes when a page is lost out of turn: what was known of chains must be looked up again."""
        self.evicted = 0

    def is_ready(self, key: PageKey) -> bool:
        """Whether the page can be loaded from host memory now."""
        row = self.index.find(key)
        return row != NOWHERE and bool(self.in_host.ready[row])

    def is_kept(self, key: PageKey) -> bool:
        """Whether the page is in any tier, or on its way there."""
        return self.index.is_resident(key)

    def is_restorable(self, key: PageKey) -> bool:
        """Whether the page's bytes exist in some tier."""
        row = self.index.find(key)
        return row != NOWHERE and (bool(self.in_host.ready[row]) or row in self.on_disk)

    def pin(self, row: int) -> None:
        self.index.pin(row)

    def unpin(self, row: int) -> None:
        self.index.unpin(row)
        self.offer(row)

    def offer(self, row: int) -> None:
        """Something may have made `row` evictable."""
        if row != NOWHERE and not self.index.pins[row]:
            for order in (self.host_order, self.disk_order, self.dirty_order):
                if order.tier.slot[row] != NOWHERE:
                    order.offer(row)

    def is_idle(self, row: int) -> bool:
        """Whether the page could be evicted from every tier that it is in, were it its turn."""
        unfollowed = not any(tier.children[row] for tier in self.index.tiers)
        wanted = any(order.demand.is_wanted(row) for order in (self.host_order, self.disk_order))
        return unfollowed and not wanted and not self.index.pins[row]

    def note_prompt(self, keys: Sequence[PageKey], now: float) -> None:
        """A request with the prompt `keys` came; to be called once for each."""
        find, kind = self.index.find, self.index.kind
        for key, known in zip(keys, self.next_use.used(keys, now), strict=True):
            if (row := find(key)) != NOWHERE:
                kind[row] = known

    def want(self, request: str, row: int) -> None:
        """`request`, which waits, will ask for the pages up to `row`."""
        for order in (self.host_order, self.disk_order):
            order.demand.want(request, row)

    def unwant(self, request: str) -> None:
        """`request` waits no more."""
        for order in (self.host_order, self.disk_order):
            order.demand.forget(request)
        self.waiting.discard(request)

    def admit(
        self, key: PageKey, parent: PageKey | None, position: int, for_rank: int = NOT_WAITING
    ) -> int | None:
        """A pinned row with a host slot for `key`, evicting what may go first; None where nothing can go.

        The page is not ready until `land`. `for_rank`: of the waiting request that it is for.
        """
        slot = self._take_slot(parent, for_rank)
        if slot is None:
            return None
        row = self.index.add(key, parent, position)
        (self.index.kind[row],) = self.next_use.kinds([key])
        self.index.place(row, self.in_host, slot)
        self.index.pin(row)
        return row

    def _take_slot(self, before: PageKey | None, for_rank: int) -> int | None:
        """A free slot, or that of the page to evict; never that of `before`, whose chain is to grow."""
        if not self.host.free_slots:
            row = NOWHERE if before is None else self.index.find(before)
            if row != NOWHERE:
                self.index.pin(row)
            victim = self.host_order.take(for_rank=for_rank)
            if victim is not None and for_rank != NOT_WAITING and victim in self.dirty:
                self.offer(
                    victim
                )  # Fetching ahead must not lose what is on no disk yet: it will be written soon.
            elif victim is not None:
                self.leave_host(victim)
                self.evicted += 1
            if row != NOWHERE:
                self.unpin(row)
        return self.host.take_slot()

    def land(self, row: int, *, clean: bool) -> None:
        """The bytes of an admitted page have arrived; `clean`: from the disk."""
        self.in_host.ready[row] = True
        if not clean:
            self.soil(row)

    def soil(self, row: int) -> None:
        """Say that the page in host memory is wanted on disk."""
        if self.has_disk and row in self.in_host and row not in self.on_disk and row not in self.dirty:
            self.index.place(row, self.dirty, row)

    def launder(self, row: int) -> None:
        """The page is not, or no longer, wanted on disk."""
        if row in self.dirty:
            self._leave(row, self.dirty)

    def leave_host(self, row: int) -> None:
        if row in self.dirty and self.on_disk.children[row]:
            self.epoch += 1  # Pages on disk that follow it are out of reach until it is computed again.
        self.index.pin(row)
        self.launder(row)
        self.host.give_back(self._leave(row, self.in_host))
        self.unpin(row)

    def settle_on_disk(self, row: int, slot: int) -> None:
        self.launder(row)  # It was used again while it was being written.
        self.index.place(row, self.on_disk, slot)

    def leave_disk(self, row: int) -> int:
        """Returns the slot it leaves; the disk tier is to be told."""
        if row not in self.in_host and self.in_host.children[row]:
            self.epoch += 1  # Pages in host memory that follow it are out of reach until it is computed again.
        self.index.pin(row)
        slot = self._leave(row, self.on_disk)
        self.soil(row)
        self.unpin(row)
        return slot

    def adopt(self, records: Iterable[DiskRecord], remove: Callable[[list[int]], None]) -> None:
        """Take in what the disk held when it was opened."""
        index, twice = self.index, []
        for record in records:
            row = index.add(record.key, record.parent, record.base_position)
            if row in self.on_disk:
                twice.append(record.slot)
                continue
            index.checksum[row], index.last_use[row] = record.checksum, record.last_use
            index.uses[row] = record.uses
            index.place(row, self.on_disk, record.slot)
        for row in index.rows():
            self.disk_order.offer(row)
        remove(twice)

    def forget_disk(self) -> None:
        """There is no disk tier any more; its pages stay where they are. Walks all rows."""
        self.has_disk = False
        for row in self.rows_on_disk():
            self.leave_disk(row)
        for row in [row for row in self.index.rows() if row in self.dirty]:
            self.launder(row)
        self.epoch += 1

    def rows_on_disk(self) -> list[int]:
        """Walks all rows."""
        return [row for row in self.index.rows() if row in self.on_disk]

    def expire(self, count: int, limit: float) -> int:
        """Drop from host memory up to `count` pages that were last used before `limit`."""
        for expired in range(count):
            if (row := self.host_order.take(limit)) is None:
                return expired
            self.leave_host(row)
        return count

    def _leave(self, row: int, tier: Residency) -> int:
        parent = self.index.parent[row]
        for order in (self.host_order, self.disk_order):
            if order.tier is tier:
                order.demand.left(row)
        slot = self.index.displace(row, tier)
        self.offer(parent)
        return slot

    def check_invariants(self) -> None:
        """Walks everything; raises AssertionError where a count, slot or link disagrees."""
        self.index.check_invariants()
        for order in (self.host_order, self.disk_order):
            order.demand.check_invariants()
        rows = [row for row in self.index.rows() if row in self.in_host]
        self.host.check_invariants({self.in_host.slot[row] for row in rows})
        for row in self.index.rows():
            assert row not in self.dirty or (row in self.in_host and row not in self.on_disk)
        for row in rows:
            assert self.in_host.ready[row] or self.index.pins[row], "a page without bytes can be evicted"
            parent = self.index.parent[row]
            closed = not self.index.position[row] or parent in self.in_host or parent in self.on_disk
            assert closed or self.epoch, "a page is in host memory without the one before it"
