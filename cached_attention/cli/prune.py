"""`cached-attention prune`: shrink stores."""

from __future__ import annotations

import sqlite3
import time
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from cached_attention.cli.arguments import StoreDirectory, duration, size, stores_below
from cached_attention.config import format_size
from cached_attention.tiers.disk_directory import DirectoryInUseError
from cached_attention.tiers.disk_pruning import prune as prune_stores


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
    """Drop old pages from every store below DIR and free their space. Refused while a server uses DIR."""
    if older_than is None and to_size is None:
        raise typer.BadParameter("say what to drop: --older-than, --to-size, or both.")
    before = None if older_than is None else time.time() - duration(older_than)
    limit = None if to_size is None else size(to_size)
    console = Console()
    found = stores_below(directory)
    table = Table("store", "pages dropped", "pages kept", "freed", "")
    dropped = kept = freed = 0
    try:
        with console.status("pruning") as status:
            for done in prune_stores(directory, before, limit):
                name = found.name(done.store)
                status.update(f"pruned {name}")
                table.add_row(name, *_words(done.dropped, done.kept, done.freed), done.note)
                dropped, kept, freed = dropped + done.dropped, kept + done.kept, freed + done.freed
    except (DirectoryInUseError, PermissionError) as error:
        console.print(f"[red]{error}[/red]")
        raise typer.Exit(1) from error
    except (OSError, sqlite3.Error) as error:
        console.print(
            f"[red]{type(error).__name__}: {error}. Nothing more was dropped. To drop pages takes a little space "
            "and the only access: if the file system is full, or another program reads an index, make room, or "
            "end that program. Whole stores may also be removed by hand: they are only a cache.[/red]"
        )
        raise typer.Exit(1) from error
    if len(found.stores) > 1:
        table.add_section()
        table.add_row("all", *_words(dropped, kept, freed), "")
    console.print(table)


def _words(dropped: int, kept: int, freed: int) -> tuple[str, str, str]:
    return f"{dropped:,}", f"{kept:,}", format_size(freed)
