"""`cached-attention prune`: less."""

from __future__ import annotations

import time
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from cached_attention.cli.arguments import StoreDirectory, duration, size
from cached_attention.config import format_size
from cached_attention.tiers.disk_directory import DirectoryInUseError
from cached_attention.tiers.disk_pruning import prune as prune_stores


def prune(
    directory: StoreDirectory,
    older_than: Annotated[
        str | None, typer.Option(help="Drop pages that were not used for this long, e.g. 12h or 7d.")
    ] = None,
    to_size: Annotated[
        str | None, typer.Option(help="Then drop the coldest pages until DIR takes this much, e.g. 100GB.")
    ] = None,
) -> None:
    """Drop old pages from every store in DIR and give their space back. Not beside a server."""
    if older_than is None and to_size is None:
        raise typer.BadParameter("say what to drop: --older-than, --to-size, or both.")
    before = None if older_than is None else time.time() - duration(older_than)
    limit = None if to_size is None else size(to_size)
    console = Console()
    table = Table("store", "pages dropped", "pages kept", "freed", "")
    try:
        with console.status("pruning") as status:
            for done in prune_stores(directory, before, limit):
                status.update(f"pruned {done.store.name}")
                table.add_row(
                    done.store.name, f"{done.dropped:,}", f"{done.kept:,}", format_size(done.freed), done.note
                )
    except DirectoryInUseError as error:
        console.print(f"[red]{error}[/red]")
        raise typer.Exit(1) from error
    console.print(table)
