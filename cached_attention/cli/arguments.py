"""Arguments shared by several commands."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Annotated

import typer

from cached_attention.config import LEAST_BYTES, ConfigError, parse_size
from cached_attention.encryption import KEY_VARIABLE, EncryptionKey, key_place, read_key
from cached_attention.tiers.disk_ranks import FoundStores, NoStoresError, find_stores

StoreDirectory = Annotated[
    Path,
    typer.Argument(
        metavar="DIR",
        exists=True,
        file_okay=False,
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

_SECONDS = {"s": 1, "m": 60, "h": 3600, "d": 86400, "w": 604800}
_DURATION = re.compile(r"([0-9]*\.?[0-9]+)([smhdw])")


def stores_below(directory: Path) -> FoundStores:
    """Stores that a `StoreDirectory` argument refers to."""
    try:
        return find_stores(directory)
    except NoStoresError as error:
        raise typer.BadParameter(str(error)) from error


def encryption_key(file: Path | None) -> EncryptionKey | None:
    """Key given by `KeyFile` or the environment; None if neither is set."""
    try:
        place = key_place("--encryption-key-file", None if file is None else str(file))
        return None if place is None else read_key(place)
    except ConfigError as error:
        raise typer.BadParameter(str(error)) from error


def duration(text: str) -> float:
    """Parse a duration such as '90s', '30m', '1.5h', '7d' or '2w' into seconds."""
    match = _DURATION.fullmatch(text.strip().lower())
    if match is None:
        raise typer.BadParameter(f"{text!r} is not a duration: give a number and s, m, h, d or w, such as 12h.")
    return float(match[1]) * _SECONDS[match[2]]


def size(text: str) -> int:
    """Parse a size such as '64GB', '1.5TB' or '512MiB' into bytes."""
    try:
        bare = float(text)
    except ValueError:
        bare = LEAST_BYTES
    if bare < LEAST_BYTES:
        raise typer.BadParameter(f"{text!r} has no unit: give a size such as 64GB.")
    try:
        return parse_size("size", text, available=sys.maxsize)
    except ConfigError as error:
        raise typer.BadParameter(f"{text!r} is not a size: give one such as 64GB.") from error


def words(seconds: float) -> str:
    """7300 -> '2.0 h'."""
    for unit, length in (("d", 86400), ("h", 3600), ("min", 60)):
        if seconds >= 2 * length:
            return f"{seconds / length:.1f} {unit}"
    return f"{seconds:.0f} s"
