"""`cached-attention verify`: every checksum."""

from __future__ import annotations

from contextlib import closing
from pathlib import Path

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from cached_attention.cli.arguments import KeyFile, StoreDirectory, encryption_key
from cached_attention.encryption import EncryptionKey
from cached_attention.tiers.disk_directory import stores
from cached_attention.tiers.disk_index import INDEX_ERRORS
from cached_attention.tiers.disk_reader import StoreReader
from cached_attention.tiers.disk_rows import KeyNeededError


def verify(directory: StoreDirectory, encryption_key_file: KeyFile = None) -> None:
    """Read every page of every store in DIR and compare its checksum; exit status 1 if any is damaged.

    Changes nothing and works beside a server: pages that it replaces meanwhile are no damage. An encrypted
    store needs its key; exit status 2 if there was no damage but a store whose key was not given.
    """
    key = encryption_key(encryption_key_file)
    console = Console()
    table = Table("store", "pages", "damaged pages", "damaged rows", "index")
    damaged, unread = False, 0
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console) as progress:
        for store in stores(directory):
            try:
                row = _verify_store(store, key, progress)
            except KeyNeededError:
                unread += 1
                table.add_row(store.name, "?", "?", "?", "encrypted with another key than given")
                continue
            damaged |= row[2:] != ("0", "0", "good")
            table.add_row(*row)
    console.print(table)
    console.print("damage found" if damaged else "no damage")
    if unread:
        console.print(f"{unread} stores were not verified: give their key with --encryption-key-file.")
    if damaged or unread:
        raise typer.Exit(1 if damaged else 2)


def _verify_store(store: Path, key: EncryptionKey | None, progress: Progress) -> tuple[str, str, str, str, str]:
    try:
        with closing(StoreReader(store, key)) as reader:
            problem = reader.index_problem()
            task = progress.add_task(store.name, total=reader.summary().pages)
            pages = bad = 0
            for record in reader.records():
                pages += 1
                bad += not reader.is_good(record)
                progress.advance(task)
            return store.name, str(pages), str(bad), str(len(reader.damaged_rows)), problem or "good"
    except KeyNeededError:
        raise
    except (ValueError, OSError, *INDEX_ERRORS) as error:
        return store.name, "?", "?", "?", str(error)
