"""`cached-attention inspect`: what lies in a directory."""

from __future__ import annotations

import time
from contextlib import closing
from pathlib import Path

from rich.console import Console
from rich.table import Table

from cached_attention.cli.arguments import StoreDirectory, words
from cached_attention.config import format_size
from cached_attention.tiers.disk_directory import is_owned, owner, stores
from cached_attention.tiers.disk_index import INDEX_ERRORS
from cached_attention.tiers.disk_reader import StoreReader
from cached_attention.tiers.disk_space import disk_usage


def inspect(directory: StoreDirectory) -> None:
    """Pages, bytes, tokens, age and hits of every store in DIR, and what each is for. Works beside a server."""
    console = Console()
    found = stores(directory)
    for store in found:
        console.print(_store_table(store))
    console.print(f"{len(found)} stores, {format_size(disk_usage(directory))} on disk, {_owner(directory)}.")


def _owner(directory: Path) -> str:
    if is_owned(directory):
        return f"in use by {owner(directory) or 'a process'}"
    return "not in use"


def _store_table(store: Path) -> Table:
    table = Table(title=f"Store {store.name}", show_header=False, title_justify="left")
    try:
        with closing(StoreReader(store)) as reader:
            for name, value in {**reader.fingerprint.describe(), **_contents(reader)}.items():
                table.add_row(name, value)
    except (ValueError, *INDEX_ERRORS) as error:
        table.add_row("unreadable", str(error))
    table.add_row("on disk", format_size(disk_usage(store)))
    return table


def _contents(reader: StoreReader) -> dict[str, str]:
    summary, fingerprint, now = reader.summary(), reader.fingerprint, time.time()
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
