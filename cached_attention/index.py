"""Which pages are known, where they are, and how they chain.

Columns instead of objects: a page costs a dictionary entry and a few array cells, so that an index
of 10^6 disk pages stays below 300 MB.
"""

from __future__ import annotations

from array import array
from collections.abc import Callable, Container, Iterator, Sequence
from itertools import repeat
from typing import Any

import numpy as np

from cached_attention.alias_table import AliasTable

PageKey = bytes
"""SHA-256 of the tokens up to and including the page, seeded with the request's namespace."""
KEY_BYTES = 32

NOWHERE = -1
"""No slot, no parent, no row."""
_MOST_USES = (1 << 32) - 1


class Residency:
    """One tier's columns of the index."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.slot = array("i")
        self.ready = bytearray()
        """Whether the page's bytes have landed; until then its slot is taken, but must not be read."""
        self.children = array("i")
        """Number of direct successors in this tier."""
        self.pages = 0
        """Number of records; pages that share one count once."""

    def __contains__(self, row: int) -> bool:
        return row != NOWHERE and self.slot[row] != NOWHERE


class _Rows(dict[PageKey, int]):
    """Row per key; NOWHERE, without a new entry, for unknown keys."""

    def __missing__(self, key: PageKey) -> int:
        return NOWHERE


class PageIndex:
    """Pages by key, linked to their predecessors.

    A row exists while its page is in a tier, is pinned, has a successor, or has an alias. Links are never broken,
    so pinning the last page of a chain keeps the whole chain.

    An alias is a row with its own key and place in a chain that shares the bytes of another row, its origin. A
    record leaves a tier with the last row that shares it.
    """

    def __init__(self, *tiers: str) -> None:
        self.tiers = [Residency(name) for name in tiers]
        self.keys: list[PageKey | None] = []
        self.parent = array("i")
        self.position = array("i")
        """Base position: position of the page's first token when its keys were rotated."""
        self.last_use = array("d")
        self.walked = array("I")
        """Whole seconds since the epoch at which a use of a successor was last noted here, see `Uses`."""
        self.checksum = array("Q")
        """Checksum of the record's bytes and key; valid once the page is ready in a tier, and not for aliases."""
        self.uses = array("I")
        """Number of times the page was used, including when it was computed."""
        self.kind = bytearray()
        """Class of the page, see `NextUse`; set by the user of the index."""
        self.pins = array("i")
        self._references = array("i")
        """Tiers that hold the page, plus its successors and aliases; at zero the row is removed."""
        self._rows = _Rows()
        self.find: Callable[[PageKey], int] = self._rows.__getitem__
        """The row of a key; NOWHERE if unknown."""
        self._free: list[int] = []
        self.aliases = AliasTable()
        of_tiers: list[tuple[array[Any] | bytearray, int]] = [
            (column, NOWHERE) for column in (tier.slot for tier in self.tiers)
        ]
        of_tiers += [(column, 0) for tier in self.tiers for column in (tier.children, tier.ready)]
        self._columns: list[tuple[array[Any] | bytearray, int]] = [
            (self.parent, NOWHERE),
            (self.position, NOWHERE),
            *((column, 0) for column in (self.last_use, self.walked, self.checksum, self.uses, self.kind)),
            *((column, 0) for column in (self.pins, self._references)),
            *of_tiers,
        ]
        """All columns with their values for unused rows; they may have more rows than `keys`."""

    def __len__(self) -> int:
        return len(self._rows)

    @property
    def known(self) -> Container[PageKey]:
        """The keys of all rows, as a dictionary: for fast lookups of keys that are mostly absent."""
        return self._rows

    def rows(self) -> Iterator[int]:
        return iter(self._rows.values())

    def key(self, row: int) -> PageKey:
        """The key of a row in use."""
        key = self.keys[row]
        assert key is not None, f"row {row} is free"
        return key

    def path(self, row: int) -> list[PageKey]:
        """The keys of the chain that ends with `row`; empty for NOWHERE."""
        keys = []
        while row != NOWHERE:
            keys.append(self.key(row))
            row = self.parent[row]
        return keys[::-1]

    def is_resident(self, key: PageKey) -> bool:
        """Whether `key` has a slot in any tier."""
        row = self.find(key)
        if row != NOWHERE:
            for tier in self.tiers:
                if tier.slot[row] != NOWHERE:
                    return True
        return False

    def add(self, key: PageKey, parent: PageKey | None, position: int) -> int:
        """The row of `key`, created if new; links it to `parent` if it had no parent."""
        row = self._rows.get(key, NOWHERE)
        if row == NOWHERE:
            row = self._new_row(key)
        self.position[row] = position
        if parent is not None and self.parent[row] == NOWHERE:
            self._link(row, parent)
        return row

    def reserve(self, rows: int) -> None:
        """Make room for `rows` at once: columns that grow alternately fragment memory."""
        if (missing := rows - len(self.parent)) > 0:
            for column, value in self._columns:
                cell = bytes([value]) if isinstance(column, bytearray) else array(column.typecode, [value])
                column.extend(cell * missing)

    def _new_row(self, key: PageKey) -> int:
        if self._free:
            row = self._free.pop()
            self.keys[row], self.last_use[row], self.walked[row] = key, 0.0, 0
            self.uses[row], self.kind[row] = 0, 0
        else:
            row = len(self.keys)
            self.keys.append(key)
            if len(self.keys) > len(self.parent):
                self.reserve(row + row // 8 + 64)
        self._rows[key] = row
        return row

    def _link(self, row: int, parent_key: PageKey) -> None:
        parent = self._rows.get(parent_key, NOWHERE)
        if parent == NOWHERE:
            parent = self._new_row(parent_key)
        self.parent[row] = parent
        self._references[parent] += 1
        for tier in self.tiers:
            tier.children[parent] += row in tier

    def alias(self, key: PageKey, parent: PageKey | None, place: int, origin: int) -> int:
        """The row of `key`, as an alias of `origin`, which is not an alias itself.

        Neither `key` nor any alias of it is in a tier. Its first token is at `place` in its prompt.
        """
        row = self.add(key, parent, self.position[origin])
        assert not any(row in tier for tier in self.tiers), "a page with bytes of its own cannot be an alias"
        if self.aliases.origin(row) == origin:
            return row
        self.separate(row)
        self._separate_aliases(row)
        self.aliases.add(row, origin, place - self.position[origin])
        self._references[origin] += 1
        return row

    def separate(self, row: int) -> None:
        """Make `row`, which is in no tier, an ordinary row again."""
        if row not in self.aliases:
            return
        origin = self.aliases.remove(row)
        self._references[origin] -= 1
        self.forget_unused(origin)

    def _separate_aliases(self, row: int) -> None:
        """`row` becomes an alias: its own aliases, none of which is in a tier, shared bytes that are gone."""
        self.pins[row] += 1
        for alias in tuple(self.aliases.of(row)):
            assert not any(alias in tier for tier in self.tiers), "the bytes of an alias in a tier must stay"
            self.separate(alias)
        self.pins[row] -= 1

    def shares(self, row: int, tier: Residency) -> int:
        """Another row in `tier` that shares the bytes of `row`; NOWHERE if there is none."""
        if not self.aliases.is_shared(row):
            return NOWHERE
        return next((other for other in self.aliases.sharers(row) if other != row and other in tier), NOWHERE)

    def place(self, row: int, tier: Residency, slot: int) -> None:
        """Put `row` into `tier`; rows that share its bytes there must have the same `slot`."""
        tier.pages += self.shares(row, tier) == NOWHERE
        tier.slot[row], tier.ready[row] = slot, False
        self._references[row] += 1
        if (parent := self.parent[row]) != NOWHERE:
            tier.children[parent] += 1

    def place_run(self, rows: Sequence[int], tier: Residency, slots: Sequence[int]) -> None:
        """`place` for many rows without shared bytes, much faster."""
        slot, ready, children = tier.slot, tier.ready, tier.children
        references, parents = self._references, self.parent
        for row, at in zip(rows, slots, strict=True):
            slot[row], ready[row] = at, False
            references[row] += 1
            if (parent := parents[row]) != NOWHERE:
                children[parent] += 1
        tier.pages += len(rows)

    def place_many(
        self,
        tier: Residency,
        keys: Sequence[PageKey],
        slots: Sequence[int],
        parents: Sequence[PageKey | None],
        positions: Sequence[int],
        checksums: Sequence[int],
        last_uses: Sequence[float],
        uses: Sequence[int],
    ) -> list[int]:
        """`add` and `place` for many pages, much faster.

        Returns the slots that were skipped because their page is in `tier` already.
        """
        rows = self._add_many(keys)
        parent_rows = self._find_many(parents)
        if np.count_nonzero(parent_rows == NOWHERE) > parents.count(None):
            self._add_many([key for key in parents if key is not None])
            parent_rows = self._find_many(parents)
        # Views of the columns, which cannot grow while one is held.
        slot, parent = np.asarray(tier.slot), np.asarray(self.parent)
        first = np.zeros(len(rows), np.bool_)
        first[np.unique(rows, return_index=True)[1]] = True
        new = first & (slot[rows] == NOWHERE)
        placed = rows[new]
        for column, values in (
            (slot, slots),
            (self.position, positions),
            (self.checksum, np.array(checksums, np.uint64)),
            (self.last_use, last_uses),
            (self.uses, np.clip(uses, 0, _MOST_USES)),
        ):
            np.asarray(column)[placed] = np.asarray(values)[new]
        unlinked = new & (parent_rows != NOWHERE) & (parent[rows] == NOWHERE)
        parent[rows[unlinked]] = parent_rows[unlinked]
        references = np.asarray(self._references)
        references[placed] += 1
        np.add.at(references, parent_rows[unlinked], 1)
        before = parent[placed]
        np.add.at(np.asarray(tier.children), before[before != NOWHERE], 1)
        tier.pages += len(placed)
        return np.asarray(slots)[~new].tolist()

    def _find_many(self, keys: Sequence[PageKey | None]) -> np.ndarray:
        rows: dict[PageKey | None, int] = self._rows  # type: ignore[assignment]
        return np.fromiter(map(rows.get, keys, repeat(NOWHERE)), np.intc, len(keys))

    def _add_many(self, keys: Sequence[PageKey]) -> np.ndarray:
        """The rows of `keys`, created if new."""
        start = len(self.keys)
        new: Sequence[PageKey] = keys
        if not self._rows.keys().isdisjoint(keys) or len(set(keys)) < len(keys):
            new = [key for key in dict.fromkeys(keys) if key not in self._rows]
        self._rows.update(zip(new, range(start, start + len(new)), strict=True))
        self.keys += new
        self.reserve(len(self.keys))
        if new is keys:
            return np.arange(start, start + len(new))
        return self._find_many(keys)

    def leaves(self, tier: Residency) -> Iterator[int]:
        """Rows without successors in `tier`, by last use. Walks all rows; the index must not grow meanwhile."""
        found = np.flatnonzero((np.asarray(tier.slot) != NOWHERE) & (np.asarray(tier.children) == 0))
        order = np.argsort(np.asarray(self.last_use)[found], kind="stable")
        return map(int, found[order])

    def displace(self, row: int, tier: Residency) -> int:
        """Remove the page from `tier`; returns its slot, which others may share. The row may be gone then."""
        slot, tier.slot[row], tier.ready[row] = tier.slot[row], NOWHERE, False
        tier.pages -= self.shares(row, tier) == NOWHERE
        self._references[row] -= 1
        if (parent := self.parent[row]) != NOWHERE:
            tier.children[parent] -= 1
            self.last_use[parent] = max(self.last_use[parent], self.last_use[row])
            self.uses[parent] = max(self.uses[parent], self.uses[row])
        self.forget_unused(row)
        return slot

    def displace_run(self, rows: Sequence[int], tier: Residency) -> list[int]:
        """`displace` for a run of a chain, tail first, much faster.

        The only successor of each row is the one before it in `rows`, and none shares its bytes.
        """
        slot, ready, children, parents = tier.slot, tier.ready, tier.children, self.parent
        references, pins, uses, last_use = self._references, self.pins, self.uses, self.last_use
        keys, known, free = self.keys, self._rows, self._free
        slots = [slot[row] for row in rows]
        for row in rows:
            slot[row], ready[row] = NOWHERE, False
            references[row] = left = references[row] - 1
            if (parent := parents[row]) != NOWHERE:
                children[parent] -= 1
                if last_use[row] > last_use[parent]:
                    last_use[parent] = last_use[row]
                if uses[row] > uses[parent]:
                    uses[parent] = uses[row]
            if not (left or pins[row]):
                del known[keys[row]]  # type: ignore[arg-type]
                keys[row], parents[row] = None, NOWHERE
                free.append(row)
                if parent != NOWHERE:
                    references[parent] -= 1
        self.forget_unused(parent)
        tier.pages -= len(rows)
        return slots

    def forget_unused(self, row: int) -> None:
        """Remove the row, and its predecessors, as far as nothing refers to them."""
        while row != NOWHERE and not (self._references[row] or self.pins[row]):
            parent = self.parent[row]
            if row in self.aliases:
                self.separate(row)
            del self._rows[self.key(row)]
            self.keys[row], self.parent[row] = None, NOWHERE
            self._free.append(row)
            if parent != NOWHERE:
                self._references[parent] -= 1
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
        for row, origin in self.aliases.check_invariants():
            followers[origin] = followers.get(origin, 0) + 1
            assert self.keys[origin] is not None, "the bytes of an alias are those of a row that is gone"
            assert self.position[row] == self.position[origin]
        for row in self._rows.values():
            references = followers.get(row, 0) + sum(row in tier for tier in self.tiers)
            assert self._references[row] == references
            assert references or self.pins[row], "a row that nothing refers to lives on"
        for tier in self.tiers:
            resident = [row for row in self._rows.values() if row in tier]
            slots = {tier.slot[row]: self.aliases.origin(row) for row in resident}
            assert tier.pages == len(slots)
            for row in resident:
                assert slots[tier.slot[row]] == self.aliases.origin(row), "two pages in one slot"
            assert len(set(slots.values())) == len(slots), "a page in two slots"
            children: dict[int, int] = {}
            for row in resident:
                children[self.parent[row]] = children.get(self.parent[row], 0) + 1
            for row in self._rows.values():
                assert tier.children[row] == children.get(row, 0)
