"""`cached-attention verify`: every checksum."""

from __future__ import annotations

from contextlib import closing
from pathlib import Path

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from cached_attention.cli.arguments import StoreDirectory
from cached_attention.tiers.disk_directory import stores
from cached_attention.tiers.disk_index import INDEX_ERRORS
from cached_attention.tiers.disk_reader import StoreReader


def verify(directory: StoreDirectory) -> None:
    """Read every page of every store in DIR and compare its checksum; exit status 1 if any is damaged.

    Changes nothing and works beside a server: pages that it replaces meanwhile are no damage.
    """
    console = Console()
    table = Table("store", "pages", "damaged pages", "damaged rows", "index")
    damaged = False
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console) as progress:
        for store in stores(directory):
            row = _verify_store(store, progress)
            damaged |= row[2:] != ("0", "0", "good")
            table.add_row(*row)
    console.print(table)
    console.print("damage found" if damaged else "no damage")
    if damaged:
        raise typer.Exit(1)


def _verify_store(store: Path, progress: Progress) -> tuple[str, str, str, str, str]:
    try:
        with closing(StoreReader(store)) as reader:
            problem = reader.index_problem()
            task = progress.add_task(store.name, total=reader.summary().pages)
            pages = bad = 0
            for record in reader.records():
                pages += 1
                bad += not reader.is_good(record)
                progress.advance(task)
            return store.name, str(pages), str(bad), str(len(reader.damaged_rows)), problem or "good"
    except (ValueError, OSError, *INDEX_ERRORS) as error:
        return store.name, "?", "?", "?", str(error)
