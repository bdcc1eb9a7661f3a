"""`cached-attention inspect`: contents of a directory."""

from __future__ import annotations

import time
from contextlib import closing
from pathlib import Path
from typing import NamedTuple

import typer
from rich.console import Console
from rich.table import Table

from cached_attention.cli.arguments import StoreDirectory, counted, stores_below, words
from cached_attention.fingerprint import Fingerprint
from cached_attention.tiers.disk_directory import is_owned, owner
from cached_attention.tiers.disk_index import INDEX_ERRORS
from cached_attention.tiers.disk_ranks import FoundStores
from cached_attention.tiers.disk_reader import StoreReader, StoreSummary
from cached_attention.tiers.disk_space import disk_usage
from cached_attention.units import format_size


class _Contents(NamedTuple):
    pages: int
    page_bytes: int
    described: dict[str, str]
    is_readable: bool = True


def inspect(directory: StoreDirectory) -> None:
    """Show pages, bytes, tokens, age, uses and model of every store below DIR. Works beside a running server."""
    console = Console()
    pages = size = unreadable = 0
    with stores_below(directory) as found:
        for store in found.stores:
            contents = _read(store)
            unreadable += not contents.is_readable
            pages += contents.pages
            size += contents.pages * contents.page_bytes
            console.print(_table(found.name(store), store, contents))
        console.print(
            f"{counted(len(found.stores), 'store')}, {counted(pages, 'page')} of {format_size(size)} in all, "
            f"{format_size(found.usage)} on disk, {_owners(found)}."
        )
    if unreadable:
        raise typer.Exit(1)


def _owners(found: FoundStores) -> str:
    owned = [rank.directory for rank in found.ranks if is_owned(rank.directory)]
    if not owned:
        return "not in use"
    if len(found.ranks) == 1:
        return f"in use by {owner(owned[0]) or 'a process'}"
    used = ", ".join(f"{found.name(path)} by {owner(path) or 'a process'}" for path in owned)
    return f"{len(owned)} of {len(found.ranks)} directories in use: {used}"


def _table(name: str, store: Path, contents: _Contents) -> Table:
    table = Table(title=f"Store {name}", show_header=False, title_justify="left")
    for row in contents.described.items():
        table.add_row(*row)
    table.add_row("on disk", format_size(disk_usage(store)))
    return table


def _read(store: Path) -> _Contents:
    try:
        with closing(StoreReader(store)) as reader:
            summary, fingerprint = reader.summary(), reader.fingerprint
            described = fingerprint.describe() | _describe(summary, fingerprint)
            return _Contents(summary.pages, fingerprint.page_bytes, described)
    except (ValueError, *INDEX_ERRORS) as error:
        return _Contents(0, 0, {"unreadable": str(error)}, is_readable=False)


def _describe(summary: StoreSummary, fingerprint: Fingerprint) -> dict[str, str]:
    now = time.time()
    once, few, many = summary.uses
    contents = {
        "pages": f"{summary.pages:,}",
        "bytes": format_size(summary.pages * fingerprint.page_bytes),
        "tokens": f"{summary.pages * fingerprint.page_size:,}",
        "pages by uses": f"{once:,} once, {few:,} two or three times, {many:,} more often",
    }
    if summary.oldest is not None and summary.newest is not None:
        newest, oldest = max(0.0, now - summary.newest), max(0.0, now - summary.oldest)
        contents["last used"] = f"from {words(oldest)} to {words(newest)} ago"
    return contents
