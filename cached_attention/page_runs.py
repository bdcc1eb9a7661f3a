"""What `Hierarchy` does with one page, for consecutive pages of a chain at once: many times faster.

For pages from disk, which are most of the pages that a scheduling pass moves.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import pairwise

from cached_attention.hierarchy import Hierarchy
from cached_attention.index import NOWHERE, PageKey


def find_on_disk(pages: Hierarchy, keys: Sequence[PageKey], first: int, end: int) -> list[int]:
    """Rows of the pages from `first` to before `end` that are on disk, not in host memory, and share no bytes.

    Stops at the first page that is not like that, or is not known to follow the one before it.
    """
    index, find = pages.index, pages.index.find
    in_host, on_disk, parents, is_shared = (
        pages.in_host.slot,
        pages.on_disk.slot,
        index.parent,
        index.aliases.is_shared,
    )
    before = find(keys[first - 1]) if first else NOWHERE
    rows: list[int] = []
    if first and before == NOWHERE:
        return rows
    for key in keys[first:end]:
        row = find(key)
        if row == NOWHERE or in_host[row] != NOWHERE or on_disk[row] == NOWHERE:
            break
        if parents[row] != before or is_shared(row):
            break
        rows.append(row)
        before = row
    return rows


def land(pages: Hierarchy, rows: Sequence[int]) -> None:
    """`Hierarchy.land` for pages that came from disk."""
    index, ready, slot = pages.index, pages.in_host.ready, pages.in_host.slot
    is_observed, is_shared, note_order = (
        pages.feed.observer is not None,
        index.aliases.is_shared,
        pages.note_order,
    )
    for row in rows:
        if is_observed or is_shared(row):
            pages.land(row, clean=True)
        else:
            ready[row] = slot[row] != NOWHERE
            note_order(row)


def give_up(pages: Hierarchy, rows: list[int]) -> None:
    """`Hierarchy.give_up` for pages that should have come from disk, where they stay; the tail of a chain last.

    What is remembered about chains stays valid: none of these pages was loadable, and all are still restorable.
    Only a page with a successor in host memory leaves a gap.
    """
    index, children = pages.index, pages.in_host.children
    wanted = pages.host_order.demand.is_wanted
    is_run = all(index.parent[row] == before for before, row in pairwise(rows))
    is_tail = not children[rows[-1]] and all(children[row] == 1 for row in rows[:-1])
    if is_run and is_tail and _are_plain(pages, rows) and not any(map(wanted, rows)):
        leave_host(pages, rows[::-1])
    else:
        for row in reversed(rows):
            pages.give_up(row)


def leave_host(pages: Hierarchy, rows: list[int]) -> None:
    """`Hierarchy.leave_host` for a run of a chain, tail first; the only successor of each is the one before."""
    if len(rows) < 2 or not _are_plain(pages, rows):
        for row in rows:
            pages.leave_host(row)
        return
    if pages.feed.observer is not None:
        for row in rows:
            pages.feed.leaves(row, pages.in_host)
    if any(map(pages.leads_to_disk, rows)):
        pages.epoch += 1
    parent = pages.index.parent[rows[-1]]
    pages.host.give_back_all(pages.index.displace_run(rows, pages.in_host))
    if parent != NOWHERE:
        pages.host_order.offer(parent)


def _are_plain(pages: Hierarchy, rows: Iterable[int]) -> bool:
    """Whether none of these pages shares its bytes or is dirty."""
    is_shared, dirty = pages.index.aliases.is_shared, pages.dirty.slot
    return not any(dirty[row] != NOWHERE or is_shared(row) for row in rows)


def unpin(pages: Hierarchy, rows: Sequence[int]) -> None:
    """`Hierarchy.unpin` for each row."""
    index = pages.index
    pins, forget_unused = index.pins, index.forget_unused
    loose: list[int] = []
    for row in rows:
        pins[row] = left = pins[row] - 1
        assert left >= 0, f"page {index.keys[row]!r} was unpinned more often than pinned"
        if not left:
            forget_unused(row)
            loose.append(row)
    for order in (pages.host_order, pages.disk_order, pages.dirty_order):
        order.offer_many(loose)
