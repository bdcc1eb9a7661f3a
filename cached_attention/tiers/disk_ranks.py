"""The directories of a server's ranks, and every store in them, below the directory that the operator gave."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Final, Literal, NamedTuple

from cached_attention.tiers.disk_directory import FINGERPRINT_NAME, LOCK_NAME, STORE_NAME, stores
from cached_attention.tiers.disk_space import disk_usage

Beside = Literal["states", "windows"]
"""What a rank keeps beside KV of full attention, in a directory of its own."""
STATES: Final[Beside] = "states"
WINDOWS: Final[Beside] = "windows"
RANK_NAME = re.compile(rf"dp\d+-pp\d+-tp\d+(-({STATES}|{WINDOWS}))?")


def rank_name(replica: int, pp_rank: int, tp_rank: int) -> str:
    """Of the directory of one rank among several on a machine, or of one whose model has more than KV."""
    return f"dp{replica}-pp{pp_rank}-tp{tp_rank}"


def beside(rank: str, what: Beside) -> str:
    """Of the directory of what `rank` keeps beside KV, each with a limit of its own."""
    return f"{rank}-{what}"


class NoStoresError(FileNotFoundError):
    """A directory is none of a server's."""


class RankStores(NamedTuple):
    """The directory of one rank, which has one owner at a time, and what was asked for of the stores in it."""

    directory: Path
    stores: list[Path]


class FoundStores(NamedTuple):
    """What lies below a directory."""

    given: Path
    ranks: list[RankStores]
    whole: list[Path]
    """What the stores lie in, nothing of it twice."""

    @property
    def stores(self) -> list[Path]:
        return [store for rank in self.ranks for store in rank.stores]

    @property
    def usage(self) -> int:
        """Bytes of the file system's blocks, other files beside the stores included, as a server counts them."""
        return sum(map(disk_usage, self.whole))

    def name(self, path: Path) -> str:
        """Of a store or a rank's directory, seen from the directory that was given."""
        return path.name if path == self.given else str(path.relative_to(self.given))


def find_stores(directory: Path) -> FoundStores:
    """Every store of the server that was given `directory`, which may also be one rank's directory or one store.

    A server with one rank has its stores in `directory`, one with several in a directory per rank; with a hybrid
    model each rank has two.

    Raises:
        NoStoresError: no server was ever given `directory`; other places are not searched.
    """
    if STORE_NAME.fullmatch(directory.name) and (directory / FINGERPRINT_NAME).is_file():
        return FoundStores(directory, [RankStores(directory.parent, [directory])], [directory])
    ranks = [RankStores(path, stores(path)) for path in _owned(directory)]
    if not ranks:
        raise NoStoresError(
            f"{directory} has no store in it, and no directory of a rank such as {rank_name(0, 0, 0)}: give what "
            f"the server was given as --cached-attention-disk-path."
        )
    apart = [rank.directory for rank in ranks if ranks[0].directory != directory or rank.directory.is_symlink()]
    whole = apart if ranks[0].directory != directory else [directory, *apart]
    return FoundStores(directory, ranks, whole)


def _owned(directory: Path) -> Iterator[Path]:
    """`directory` and those of ranks in it, as far as they have, or once had, an owner."""
    ranks = sorted((path for path in directory.iterdir() if RANK_NAME.fullmatch(path.name)), key=_numbers)
    for path in (directory, *ranks):
        if path.is_dir() and ((path / LOCK_NAME).is_file() or stores(path)):
            yield path


def _numbers(path: Path) -> list[int]:
    """So that rank 10 comes after rank 9."""
    return list(map(int, re.findall(r"\d+", path.name)))
