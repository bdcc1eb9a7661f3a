"""What enters host memory, and what leaves a tier to make room, or because it is old. Moves no bytes."""

from __future__ import annotations

from cached_attention import page_runs
from cached_attention.hierarchy import Hierarchy
from cached_attention.index import NOWHERE, PageKey
from cached_attention.policy.eviction import NOT_WAITING
from cached_attention.stats import Reason


def admit(
    pages: Hierarchy, key: PageKey, parent: PageKey | None, position: int, for_rank: int = NOT_WAITING
) -> int | None:
    """A pinned row with a host slot for `key`, evicting if necessary; None if nothing can be evicted.

    The page is not ready until `Hierarchy.land`. `for_rank`: rank of the queued request that needs it.
    """
    make_room(pages, 1, parent, for_rank)
    slot = pages.host.take_slot()
    if slot is None:
        return None
    index = pages.index
    row = index.add(key, parent, position)
    if (before := index.parent[row]) != NOWHERE:
        index.walked[row] = index.walked[before]
    if not any(row in tier for tier in index.tiers):
        index.separate(row)  # It is about to have bytes of its own.
    (index.kind[row],) = pages.next_use.kinds([key], _kind_before(pages, row))
    index.place(row, pages.in_host, slot)
    index.pin(row)
    return row


def admit_run(pages: Hierarchy, rows: list[int], for_rank: int) -> list[int]:
    """`admit` for the result of `page_runs.find_on_disk`; returns the leading rows that got a slot."""
    index = pages.index
    parent = index.parent[rows[0]]
    make_room(pages, len(rows), None if parent == NOWHERE else index.key(parent), for_rank)
    slots = pages.host.take_slots(len(rows))
    rows = rows[: len(slots)]
    index.place_run(rows, pages.in_host, slots)
    pins, kind, before = index.pins, index.kind, _kind_before(pages, rows[0]) if rows else None
    for row, known in zip(rows, pages.next_use.kinds(map(index.key, rows), before), strict=True):
        kind[row] = known
        pins[row] += 1
    return rows


def _kind_before(pages: Hierarchy, row: int) -> int | None:
    """Class of the page before `row`; None if that page is in no tier, because its class is then unknown."""
    parent = pages.index.parent[row]
    return pages.index.kind[parent] if parent in pages.in_host or parent in pages.on_disk else None


def make_room(pages: Hierarchy, slots: int, before: PageKey | None, for_rank: int = NOT_WAITING) -> None:
    """Evict from host memory until `slots` slots are free or nothing is evictable.

    `before`: a page to spare, because its chain will grow. `for_rank`: as for `admit`.
    """
    if pages.host.free_slots >= slots:
        return
    row = NOWHERE if before is None else pages.index.find(before)
    if row != NOWHERE:
        pages.pin(row)
    while (missing := slots - pages.host.free_slots) > 0 and _evict(pages, missing, for_rank):
        pass  # Evicting a page that shares its slot does not free the slot.
    if row != NOWHERE:
        pages.unpin(row)


def _evict(pages: Hierarchy, most: int, for_rank: int) -> bool:
    """Evict up to `most` pages from host memory, in eviction order; False if none could be evicted."""
    run = pages.host_order.take_run(most, for_rank)
    leaving = len(run)
    if for_rank != NOT_WAITING:
        # Prefetching must not lose pages that are not on disk yet: they will be written soon.
        leaving = next((place for place, row in enumerate(run) if row in pages.dirty), leaving)
    page_runs.leave_host(pages, run[:leaving])
    for row in run[leaving:]:
        pages.offer(row)
    pages.stats.left("host", Reason.ROOM, leaving)
    return leaving > 0


def expire(pages: Hierarchy, count: int, limit: float) -> int:
    """Drop from host memory up to `count` pages that were last used before `limit`."""
    expired = 0
    while expired < count and (row := pages.host_order.take(limit)) is not None:
        pages.leave_host(row)
        expired += 1
    pages.stats.left("host", Reason.TTL, expired)
    return expired


def evict_from_disk(pages: Hierarchy, count: int, limit: float, reason: Reason) -> list[int]:
    """Take up to `count` pages last used before `limit` off the disk; returns the slots that this frees."""
    slots: list[int] = []
    while len(slots) < count and (victim := pages.disk_order.take(limit)) is not None:
        sharers = list(pages.index.aliases.sharers(victim))
        slots += pages.leave_disk(victim)
        for row in sharers:
            # Where it stays in host memory, it is written again when it was used again.
            pages.mark_clean(row)
    pages.stats.left("disk", reason, len(slots))
    return slots
