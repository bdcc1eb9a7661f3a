"""Which pages are known, where they are, and how they chain.

Columns instead of objects: a page costs a dictionary entry and a few array cells, so that an index
of 10^6 disk pages stays below 300 MB.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterator

PageKey = bytes
"""SHA-256 of the tokens up to and including the page, seeded with the request's namespace."""

NOWHERE = -1
"""No slot, no parent, no row."""


class Residency:
    """One tier's part of the index, by row."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.slot = array("i")
        self.ready = bytearray()
        """Whether the page's bytes have landed; until then its slot is taken but nothing may read it."""
        self.children = array("i")
        """Pages in this tier that directly follow the page."""
        self.pages = 0

    def __contains__(self, row: int) -> bool:
        return row != NOWHERE and self.slot[row] != NOWHERE


class PageIndex:
    """Pages by key, linked to the page before them.

    A row lives as long as its page is in a tier, is pinned, or is followed by a page that is known:
    links are never broken, so pinning the last page of a chain keeps the whole chain.
    """

    def __init__(self, *tiers: str) -> None:
        self.tiers = [Residency(name) for name in tiers]
        self.keys: list[PageKey | None] = []
        self.parent = array("i")
        self.position = array("i")
        """Base position: that of the page's first token when its keys were rotated."""
        self.last_use = array("d")
        self.checksum = array("Q")
        """Of the record's bytes and key; means something once the page is ready in a tier."""
        self.uses = array("I")
        """How often a request came back to the page, its making included."""
        self.kind = bytearray()
        """Class of the page, see `NextUse`; told by who uses it."""
        self.pins = array("i")
        self._places = bytearray()
        """Tiers that the page is in."""
        self._followers = array("i")
        self._rows: dict[PageKey, int] = {}
        self._free: list[int] = []

    def __len__(self) -> int:
        return len(self._rows)

    def rows(self) -> Iterator[int]:
        return iter(self._rows.values())

    def find(self, key: PageKey) -> int:
        return self._rows.get(key, NOWHERE)

    def key(self, row: int) -> PageKey:
        """The key of a row in use."""
        key = self.keys[row]
        assert key is not None, f"row {row} is free"
        return key

    def is_resident(self, key: PageKey) -> bool:
        """Whether `key` has a slot in any tier."""
        row = self.find(key)
        return row != NOWHERE and any(row in tier for tier in self.tiers)

    def add(self, key: PageKey, parent: PageKey | None, position: int) -> int:
        """The row of `key`, made where it is new; learns the link to `parent` where it was unknown."""
        row = self._rows.get(key, NOWHERE)
        if row == NOWHERE:
            row = self._new_row(key)
        self.position[row] = position
        if parent is not None and self.parent[row] == NOWHERE:
            self._link(row, parent)
        return row

    def _new_row(self, key: PageKey) -> int:
        if self._free:
            row = self._free.pop()
            self.keys[row], self.last_use[row], self.uses[row], self.kind[row] = key, 0.0, 0, 0
        else:
            row = len(self.keys)
            self.keys.append(key)
            self.last_use.append(0.0)
            self.checksum.append(0)
            self.kind.append(0)
            self._places.append(0)
            for column in (self.parent, self.position, *(tier.slot for tier in self.tiers)):
                column.append(NOWHERE)
            for column in (self.pins, self.uses, self._followers, *(tier.children for tier in self.tiers)):
                column.append(0)
            for tier in self.tiers:
                tier.ready.append(False)
        self._rows[key] = row
        return row

    def _link(self, row: int, parent_key: PageKey) -> None:
        parent = self._rows.get(parent_key, NOWHERE)
        if parent == NOWHERE:
            parent = self._new_row(parent_key)
        self.parent[row] = parent
        self._followers[parent] += 1
        for tier in self.tiers:
            tier.children[parent] += row in tier

    def place(self, row: int, tier: Residency, slot: int) -> None:
        tier.slot[row], tier.ready[row] = slot, False
        tier.pages += 1
        self._places[row] += 1
        if (parent := self.parent[row]) != NOWHERE:
            tier.children[parent] += 1

    def displace(self, row: int, tier: Residency) -> int:
        """Take the page out of `tier`; returns the slot it leaves. The row may be gone afterwards."""
        slot, tier.slot[row], tier.ready[row] = tier.slot[row], NOWHERE, False
        tier.pages -= 1
        self._places[row] -= 1
        if (parent := self.parent[row]) != NOWHERE:
            tier.children[parent] -= 1
            self.last_use[parent] = max(self.last_use[parent], self.last_use[row])
            self.uses[parent] = max(self.uses[parent], self.uses[row])
        self.forget_unused(row)
        return slot

    def forget_unused(self, row: int) -> None:
        """Drop the row, and those before it, that nothing refers to any more."""
        while row != NOWHERE and not (self._places[row] or self.pins[row] or self._followers[row]):
            parent = self.parent[row]
            del self._rows[self.key(row)]
            self.keys[row], self.parent[row] = None, NOWHERE
            self._free.append(row)
            if parent != NOWHERE:
                self._followers[parent] -= 1
            row = parent

    def pin(self, row: int) -> None:
        self.pins[row] += 1

    def unpin(self, row: int) -> None:
        self.pins[row] -= 1
        assert self.pins[row] >= 0, f"page {self.keys[row]!r} was unpinned more often than pinned"
        self.forget_unused(row)

    def check_invariants(self) -> None:
        """Recompute every count from the links; walks all rows.

        Raises:
            AssertionError: a count, link or slot disagrees.
        """
        followers: dict[int, int] = {}
        for key, row in self._rows.items():
            assert self.keys[row] == key
            assert self.pins[row] >= 0
            if (parent := self.parent[row]) != NOWHERE:
                assert self.keys[parent] is not None, "a page follows a row that is gone"
                followers[parent] = followers.get(parent, 0) + 1
        for row in self._rows.values():
            assert self._followers[row] == followers.get(row, 0)
            assert self._places[row] == sum(row in tier for tier in self.tiers)
            assert self.pins[row] or self._followers[row] or any(row in tier for tier in self.tiers)
        for tier in self.tiers:
            resident = [row for row in self._rows.values() if row in tier]
            assert tier.pages == len(resident)
            assert len({tier.slot[row] for row in resident}) == len(resident), "two pages in one slot"
            children: dict[int, int] = {}
            for row in resident:
                children[self.parent[row]] = children.get(self.parent[row], 0) + 1
            for row in self._rows.values():
                assert tier.children[row] == children.get(row, 0)
