"""`cached-attention verify`: check the checksum of every page."""

from __future__ import annotations

from contextlib import closing
from pathlib import Path
from typing import NamedTuple

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from cached_attention.cli.arguments import KeyFile, StoreDirectory, encryption_key, stores_below
from cached_attention.encryption import EncryptionKey
from cached_attention.tiers.disk_index import INDEX_ERRORS
from cached_attention.tiers.disk_reader import StoreReader
from cached_attention.tiers.disk_rows import KeyNeededError


class _Verified(NamedTuple):
    """Result for one store, or the total of all stores."""

    pages: int = 0
    damaged_pages: int = 0
    damaged_rows: int = 0
    problem: str | None = None
    """Why the store cannot be read, or what is wrong with its index."""

    @property
    def is_good(self) -> bool:
        return not (self.damaged_pages or self.damaged_rows or self.problem)

    @property
    def cells(self) -> tuple[str, ...]:
        return (*map(str, self[:3]), self.problem or "good")


def verify(directory: StoreDirectory, encryption_key_file: KeyFile = None) -> None:
    """Read every page of every store below DIR and verify its checksum; exit status 1 if any is damaged.

    Changes nothing and works while a server is running: pages that it replaces meanwhile do not count as damage.
    An encrypted store needs its key; exit status 2 if no damage was found but the key of a store was not given.
    """
    key = encryption_key(encryption_key_file)
    console = Console()
    found = stores_below(directory)
    table = Table("store", "pages", "damaged pages", "damaged rows", "index")
    total, unread = _Verified(), 0
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console) as progress:
        for store in found.stores:
            name = found.name(store)
            try:
                done = _verify_store(store, name, key, progress)
            except KeyNeededError:
                unread += 1
                table.add_row(name, "?", "?", "?", "encrypted with another key than given")
                continue
            table.add_row(name, *(done.cells if done.pages or done.is_good else ("?", "?", "?", done.problem)))
            total = _add(total, done)
    if len(found.stores) > 1:
        table.add_section()
        table.add_row("all", *total.cells)
    console.print(table)
    console.print("no damage" if total.is_good else "damage found")
    if unread:
        console.print(f"{unread} stores were not verified: give their key with --encryption-key-file.")
    if unread or not total.is_good:
        raise typer.Exit(2 if total.is_good else 1)


def _add(total: _Verified, done: _Verified) -> _Verified:
    return _Verified(
        total.pages + done.pages,
        total.damaged_pages + done.damaged_pages,
        total.damaged_rows + done.damaged_rows,
        total.problem or (done.problem and "see above"),
    )


def _verify_store(store: Path, name: str, key: EncryptionKey | None, progress: Progress) -> _Verified:
    try:
        with closing(StoreReader(store, key)) as reader:
            problem = reader.index_problem()
            task = progress.add_task(name, total=reader.summary().pages)
            pages = bad = 0
            for record in reader.records():
                pages += 1
                bad += not reader.is_good(record)
                progress.advance(task)
            return _Verified(pages, bad, len(reader.damaged_rows), problem)
    except KeyNeededError:
        raise
    except (ValueError, OSError, *INDEX_ERRORS) as error:
        return _Verified(problem=str(error) or "unreadable")
