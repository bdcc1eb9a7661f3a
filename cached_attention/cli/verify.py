"""`cached-attention verify`: check the checksum of every page."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import NamedTuple

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from cached_attention.cli.arguments import KeyFile, StoreDirectory, counted, encryption_key, stores_below
from cached_attention.encryption import EncryptionKey
from cached_attention.fingerprint import FORMAT_VERSION
from cached_attention.tiers.disk_directory import FINGERPRINT_NAME
from cached_attention.tiers.disk_index import INDEX_ERRORS
from cached_attention.tiers.disk_reader import StoreReader
from cached_attention.tiers.disk_rows import KeyNeededError


class _UnknownFormatError(ValueError):
    """The store is of another version of this program; says of which."""


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
    A store of another version of this program is not verified, which does not change the exit status.
    """
    key = encryption_key(encryption_key_file)
    console = Console()
    table = Table("store", "pages", "damaged pages", "damaged rows", "index")
    total, sealed, foreign = _Verified(), 0, 0
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with stores_below(directory) as found, Progress(*columns, console=console) as progress:
        for store in found.stores:
            name = found.name(store)
            try:
                done = _verify_store(store, name, key, progress)
            except KeyNeededError:
                sealed += 1
                why = "but with another key than given" if key else "and no key was given"
                table.add_row(name, "?", "?", "?", f"encrypted, {why}")
                continue
            except _UnknownFormatError as error:
                foreign += 1
                table.add_row(name, "?", "?", "?", str(error))
                continue
            table.add_row(name, *(done.cells if done.pages or done.is_good else ("?", "?", "?", done.problem)))
            total = _add(total, done)
    verified = len(found.stores) - sealed - foreign
    if len(found.stores) > 1:
        table.add_section()
        table.add_row("all" if verified == len(found.stores) else "all verified", *total.cells)
    console.print(table)
    for line in _verdict(total, verified, sealed, foreign):
        console.print(line, soft_wrap=True)
    if sealed or not total.is_good:
        raise typer.Exit(2 if total.is_good else 1)


def _verdict(total: _Verified, verified: int, sealed: int, foreign: int) -> Iterator[str]:
    if not total.is_good:
        yield "damage found"
    elif not (sealed or foreign):
        yield "no damage"
    elif verified:
        yield f"no damage in {counted(verified, 'store')}"
    if sealed:
        key = "its key" if sealed == 1 else "their keys"
        yield f"{_skipped(sealed)}: give {key} with --encryption-key-file."
    if foreign:
        yield f"{_skipped(foreign)}: the format is that of another version of this program."


def _skipped(count: int) -> str:
    return f"{counted(count, 'store')} {'was' if count == 1 else 'were'} not verified"


def _add(total: _Verified, done: _Verified) -> _Verified:
    return _Verified(
        total.pages + done.pages,
        total.damaged_pages + done.damaged_pages,
        total.damaged_rows + done.damaged_rows,
        total.problem or (done.problem and "see above"),
    )


def _verify_store(store: Path, name: str, key: EncryptionKey | None, progress: Progress) -> _Verified:
    _check_version(store)
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
    except (KeyNeededError, PermissionError):
        raise
    except (ValueError, OSError, *INDEX_ERRORS) as error:
        return _Verified(problem=str(error) or "unreadable")


def _check_version(store: Path) -> None:
    """Raise _UnknownFormatError if the fingerprint names another format; what cannot be read may be damage."""
    try:
        values = json.loads((store / FINGERPRINT_NAME).read_bytes())
    except PermissionError:
        raise
    except (OSError, ValueError):
        return
    version = values.get("format_version") if isinstance(values, dict) else None
    if isinstance(version, int) and version != FORMAT_VERSION:
        raise _UnknownFormatError(f"not verified: format version {version}, and {FORMAT_VERSION} is known here")
