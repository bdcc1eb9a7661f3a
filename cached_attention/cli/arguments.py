"""Arguments shared by several commands."""

from __future__ import annotations

import os
import pwd
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, NoReturn

import typer
from rich.console import Console
from rich.text import Text

from cached_attention.config import ConfigError
from cached_attention.encryption import KEY_VARIABLE, EncryptionKey, key_place, read_key
from cached_attention.tiers.disk_ranks import FoundStores, NoStoresError, find_stores
from cached_attention.units import parse_duration, parse_size

StoreDirectory = Annotated[
    Path,
    typer.Argument(
        metavar="DIR",
        readable=False,  # Typer would say of what may not be read that it does not exist.
        help="What the server was given as --cached-attention-disk-path: all stores of all its ranks. Or the "
        "directory of one rank, or one store.",
    ),
]

KeyFile = Annotated[
    Path | None,
    typer.Option(
        "--encryption-key-file",
        metavar="PATH",
        help=f"The key of encrypted stores, as the server has it; without it, ${KEY_VARIABLE}.",
    ),
]

_GIVE = "give what the server was given as --cached-attention-disk-path"
_NOTHING = re.compile(r"(0+\.?0*|\.0+)\s*([kmgt]i?)?b?", re.IGNORECASE)


@contextmanager
def stores_below(directory: Path) -> Iterator[FoundStores]:
    """Stores that a `StoreDirectory` argument refers to, for as long as they are read.

    Raises:
        typer.BadParameter: a server has no stores there, or this user may not read them.
    """
    try:
        yield _find(directory)
    except PermissionError as error:
        raise typer.BadParameter(denied(directory, "read"), param_hint="DIR") from error


def _find(directory: Path) -> FoundStores:
    try:
        return find_stores(directory)
    except (FileNotFoundError, NotADirectoryError) as error:
        if isinstance(error, NoStoresError):
            problem = str(error)
        else:
            what = "does not exist" if isinstance(error, FileNotFoundError) else "is not a directory"
            problem = f"{directory} {what}: {_GIVE}."
        raise typer.BadParameter(problem, param_hint="DIR") from error


def denied(directory: Path, what: str) -> str:
    """Sentence for a PermissionError; `what` was tried, such as "read"."""
    user = os.geteuid()
    try:
        name = pwd.getpwuid(user).pw_name
    except KeyError:
        name = str(user)
    return f"{directory} may not be {what} by user {name}: run this command as the server's user or as root."


def fail(message: str, cause: Exception) -> NoReturn:
    """End the command with exit status 1 and `message` on stderr."""
    Console(stderr=True).print(Text(f"error: {message}", style="red"), soft_wrap=True)
    raise typer.Exit(1) from cause


def encryption_key(file: Path | None) -> EncryptionKey | None:
    """Key given by `KeyFile` or the environment; None if neither is set."""
    try:
        place = key_place("--encryption-key-file", None if file is None else str(file))
        return None if place is None else read_key(place)
    except ConfigError as error:
        raise typer.BadParameter(str(error)) from error


def duration(option: str, text: str) -> float:
    """Seconds given by `text`: what a server takes, such as '90s', '1.5h', '7d' or '3600'.

    Raises:
        typer.BadParameter: not a duration.
    """
    try:
        return parse_duration(option, text)
    except ConfigError as error:
        # The server's sentence offers 0 for none, which would make `prune` drop everything.
        raise typer.BadParameter(
            f"{option} is {text!r}: give a duration such as 90s, 30m, 12h, 7d or 2w."
        ) from error


def size(option: str, text: str) -> int:
    """Bytes given by `text`, such as '64GB', '1.5TB' or '512MiB'. Unlike a server's, it is never a share.

    Raises:
        typer.BadParameter: not a size, not above zero, or a small number without a unit.
    """
    try:
        # A share, of nothing.
        return parse_size(option, text, available=0, most=sys.maxsize)
    except ConfigError as error:
        raise typer.BadParameter(
            f"{option} is {text!r}: give a size above zero with its unit, such as 64GB or 512MiB; "
            "a share of what is free is for servers only."
        ) from error


def size_or_none(option: str, text: str) -> int:
    """Like `size`, and 0 if `text` is zero."""
    return 0 if _NOTHING.fullmatch(text.strip()) else size(option, text)


def counted(count: int, what: str) -> str:
    """2, 'store' -> '2 stores'."""
    return f"{count:,} {what}" if count == 1 else f"{count:,} {what}s"


def words(seconds: float) -> str:
    """7300 -> '2.0 h'."""
    for unit, length in (("d", 86400), ("h", 3600), ("min", 60)):
        if seconds >= 2 * length:
            return f"{seconds / length:.1f} {unit}"
    return f"{seconds:.0f} s"
