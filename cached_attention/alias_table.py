"""Which rows of the index share the bytes of others."""

from __future__ import annotations

from collections.abc import Iterator, Sequence


class AliasTable:
    """An origin per alias, and how far the alias is from it. An origin is not an alias itself."""

    def __init__(self) -> None:
        self._origins: dict[int, int] = {}
        """Origin of each alias."""
        self._aliases: dict[int, list[int]] = {}
        """Aliases of each origin."""
        self._deltas: dict[int, int] = {}
        """Per alias: tokens from its base position to its place."""

    def __contains__(self, row: int) -> bool:
        """Whether `row` is an alias."""
        return row in self._origins

    def is_shared(self, row: int) -> bool:
        """Whether `row` is an alias, or has aliases."""
        return row in self._origins or row in self._aliases

    def origin(self, row: int) -> int:
        """The row under whose key the bytes of `row` were saved: its origin, or itself."""
        return self._origins.get(row, row)

    def delta(self, row: int) -> int:
        """Tokens by which the keys of the page are rotated when it is loaded."""
        return self._deltas.get(row, 0)

    def of(self, origin: int) -> Sequence[int]:
        """The aliases of `origin`."""
        return self._aliases.get(origin, ())

    def sharers(self, row: int) -> Sequence[int]:
        """All rows that share the bytes of `row`, including itself."""
        origin = self._origins.get(row, row)
        aliases = self._aliases.get(origin)
        return (row,) if aliases is None else (origin, *aliases)

    def add(self, row: int, origin: int, delta: int) -> None:
        """`row`, which is no alias, becomes one of `origin`."""
        self._origins[row] = origin
        self._deltas[row] = delta
        self._aliases.setdefault(origin, []).append(row)

    def remove(self, row: int) -> int:
        """`row` is no alias any more; returns its origin."""
        origin = self._origins.pop(row)
        del self._deltas[row]
        self._aliases[origin].remove(row)
        if not self._aliases[origin]:
            del self._aliases[origin]
        return origin

    def check_invariants(self) -> Iterator[tuple[int, int]]:
        """Yields each alias with its origin; raises AssertionError if the columns disagree."""
        for row, origin in self._origins.items():
            assert origin not in self._origins, "an alias of an alias"
            assert row in self._aliases[origin]
            yield row, origin
        assert sum(map(len, self._aliases.values())) == len(self._origins) == len(self._deltas)
