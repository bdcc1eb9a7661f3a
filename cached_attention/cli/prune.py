"""`cached-attention prune`: shrink stores."""

from __future__ import annotations

import os
import sqlite3
import time
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from cached_attention.cli.arguments import StoreDirectory, denied, duration, fail, size, stores_below
from cached_attention.tiers.disk_directory import DirectoryInUseError, is_owned, owner
from cached_attention.tiers.disk_pruning import prune as prune_stores
from cached_attention.tiers.disk_ranks import FoundStores
from cached_attention.units import format_size


def prune(
    directory: StoreDirectory,
    older_than: Annotated[
        str | None, typer.Option(help="Drop pages that were not used for this long, e.g. 12h or 7d.")
    ] = None,
    to_size: Annotated[
        str | None,
        typer.Option(
            help="Then drop the coldest pages of all stores until they take this much together, e.g. 100GB."
        ),
    ] = None,
) -> None:
    """Drop old pages from every store below DIR and free their space. Refused while a server uses DIR.

    A store whose index is damaged has no pages that could be used again. It is dropped whole: with --to-size, or
    if its newest file is older than --older-than.
    """
    if older_than is None and to_size is None:
        raise typer.BadParameter("say what to drop: --older-than, --to-size, or both.")
    before = None if older_than is None else time.time() - _age(older_than)
    limit = None if to_size is None else size("--to-size", to_size)
    console = Console()
    table = Table("store", "pages dropped", "pages kept", "freed", "")
    dropped = kept = freed = 0
    with stores_below(directory) as found:
        try:
            with console.status("pruning") as status:
                for done in prune_stores(directory, before, limit):
                    name = found.name(done.store)
                    status.update(f"pruned {name}")
                    table.add_row(name, *_words(done.dropped, done.kept, done.freed), done.note)
                    dropped, kept, freed = dropped + done.dropped, kept + done.kept, freed + done.freed
        except DirectoryInUseError as error:
            fail(_in_use(found), error)
        except PermissionError as error:
            fail(_denied(directory, error), error)
        except (OSError, sqlite3.Error) as error:
            fail(
                f"{type(error).__name__}: {error}. Nothing more was dropped. To drop pages takes a little space "
                "and the only access: if the file system is full, or another program reads an index, make room, "
                "or end that program. Whole stores may also be removed by hand: they are only a cache.",
                error,
            )
    if len(found.stores) > 1:
        table.add_section()
        table.add_row("all", *_words(dropped, kept, freed), "")
    console.print(table)


def _age(text: str) -> float:
    """Seconds. A bare number is refused, because a mistake would drop everything."""
    if text.strip().replace(".", "", 1).isdecimal():
        raise typer.BadParameter(f"--older-than is {text!r}: give a unit, such as {text}h.")
    return duration("--older-than", text)


def _in_use(found: FoundStores) -> str:
    used = next((rank.directory for rank in found.ranks if is_owned(rank.directory)), found.given)
    return (
        f"{used} is in use by {owner(used) or 'another process'}: stop that process first, or leave it to the "
        "server to drop pages (--cached-attention-ttl, --cached-attention-disk-size)."
    )


def _denied(directory: Path, error: PermissionError) -> str:
    """An error without number is `check_private`'s, and says to the owner how to mend the directory's mode."""
    own = os.geteuid() in (0, directory.stat().st_uid)
    return str(error) if error.errno is None and own else denied(directory, "changed")


def _words(dropped: int, kept: int, freed: int) -> tuple[str, str, str]:
    return f"{dropped:,}", f"{kept:,}", format_size(freed)
