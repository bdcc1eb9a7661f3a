"""Transfers adjacent slots together."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import NamedTuple, TypeVar

from cached_attention.tiers.disk_files import SlotFiles
from cached_attention.tiers.disk_records import Records
from cached_attention.tiers.health import Health
from cached_attention.tiers.page_io import PageRead, ReadOutcome

RUN_BYTES = 8 << 20
"""Adjacent slots are transferred by one system call up to this size."""
RUN_PAGES = 512
"""And up to this many slots: the kernel accepts 1,024 buffers."""
IO_ERRORS = (OSError, ValueError, TypeError)
"""Errors of the disk, and Python's for a buffer that was released meanwhile."""

Item = TypeVar("Item")
Run = list[tuple[int, Item]]


class PlacedRead(NamedTuple):
    place: int
    """Index in the caller's list."""
    page: PageRead


def runs(items: Iterable[tuple[int, Item]], files: SlotFiles) -> list[Run[Item]]:
    """Split (slot, item) pairs into runs of adjacent slots within one file, in order."""
    most = max(1, min(RUN_BYTES // files.stride, RUN_PAGES))
    found: list[Run[Item]] = []
    for slot, item in items:
        run = found[-1] if found else []
        if run and slot == run[-1][0] + 1 and slot % files.slots_per_file and len(run) < most:
            run.append((slot, item))
        else:
            found.append([(slot, item)])
    return found


def read_run(
    run: Run[PlacedRead], files: SlotFiles, health: Health, records: Records
) -> Iterator[tuple[int, ReadOutcome]]:
    """Read and verify a run; yields (place, outcome) for each page.

    After an error each page is retried alone, so that one bad sector costs one page; once errors put the tier out
    of service, the rest is not attempted.
    """
    if not health.healthy:
        yield from ((item.place, ReadOutcome.UNAVAILABLE) for _, item in run)
        return
    try:
        found = records.incoming([item.page for _, item in run])
        whole = files.read(run[0][0], found)
    except IO_ERRORS as error:
        if len(run) > 1:
            for one in run:
                yield from read_run([one], files, health, records)
        else:
            health.failed(error)
            yield run[0][1].place, ReadOutcome.LOST
        return
    health.succeeded()
    for number, (_, (place, page)) in enumerate(run):
        good = number < whole and records.accept(page, found[number])
        if not good:
            health.found_damage()
        yield place, ReadOutcome.READ if good else ReadOutcome.LOST
