"""Finds the directories of a server's ranks, and every store in them, below the operator's directory."""

from __future__ import annotations

import re
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Final, Literal, NamedTuple

from cached_attention.tiers.disk_directory import (
    FINGERPRINT_NAME,
    LOCK_NAME,
    STORE_NAME,
    DirectoryInUseError,
    is_owned,
    stores,
)
from cached_attention.tiers.disk_space import disk_usage

Beside = Literal["states", "windows"]
"""What a rank keeps in a directory of its own, in addition to KV of full attention."""
STATES: Final[Beside] = "states"
WINDOWS: Final[Beside] = "windows"
RANK_NAME = re.compile(rf"dp\d+-pp\d+-tp\d+(-({STATES}|{WINDOWS}))?")


def rank_name(replica: int, pp_rank: int, tp_rank: int) -> str:
    """Name of the directory of one rank among several on a machine, or of one whose model has more than KV."""
    return f"dp{replica}-pp{pp_rank}-tp{tp_rank}"


def beside(rank: str, what: Beside) -> str:
    """Name of the directory of what `rank` keeps in addition to KV; each has its own limit."""
    return f"{rank}-{what}"


def was_used(directory: Path) -> bool:
    """Whether a server has had its disk tier here."""
    return (directory / LOCK_NAME).exists()


def wait_for_owners(directory: Path, timeout: float) -> None:
    """Wait until no server owns the directory or one of its ranks' directories.

    Raises:
        DirectoryInUseError: one still does after `timeout` seconds.
    """
    deadline = time.monotonic() + timeout
    while directory.exists() and (owned := [*filter(is_owned, [directory, *rank_directories(directory)])]):
        if time.monotonic() > deadline:
            raise DirectoryInUseError(owned[0])
        time.sleep(0.2)


class NoStoresError(FileNotFoundError):
    """The directory does not belong to a server."""


class RankStores(NamedTuple):
    """The directory of one rank, which has one owner at a time, and the requested stores in it."""

    directory: Path
    stores: list[Path]


class FoundStores(NamedTuple):
    """Stores found below a directory."""

    given: Path
    ranks: list[RankStores]
    whole: list[Path]
    """Paths that together contain all stores, with nothing counted twice."""

    @property
    def stores(self) -> list[Path]:
        return [store for rank in self.ranks for store in rank.stores]

    @property
    def usage(self) -> int:
        """Bytes of file system blocks, including other files beside the stores, as a server counts them."""
        return sum(map(disk_usage, self.whole))

    def name(self, path: Path) -> str:
        """Name of a store or a rank's directory, relative to the directory that was given."""
        return path.name if path == self.given else str(path.relative_to(self.given))


def find_stores(directory: Path) -> FoundStores:
    """All stores of the server that was given `directory`, which may also be one rank's directory or one store.

    A server with one rank has its stores in `directory`, a server with several in a directory per rank; with a
    hybrid model each rank has two directories.

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
    """`directory` and the rank directories in it, if they have or once had an owner.

    All ranks of a server lock `directory` as well, so its lock alone says nothing where there are several.
    """
    ranks = rank_directories(directory)
    if stores(directory) or ((directory / LOCK_NAME).is_file() and not ranks):
        yield directory
    for path in ranks:
        if path.is_dir() and ((path / LOCK_NAME).is_file() or stores(path)):
            yield path


def rank_directories(directory: Path) -> list[Path]:
    """What has the name of a rank's directory in `directory`, in the order of the ranks."""
    return sorted((path for path in directory.iterdir() if RANK_NAME.fullmatch(path.name)), key=_numbers)


def _numbers(path: Path) -> list[int]:
    """Sort key that puts rank 10 after rank 9."""
    return list(map(int, re.findall(r"\d+", path.name)))
