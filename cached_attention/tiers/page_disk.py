"""What moving pages to and from a disk asks of it."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from concurrent.futures import Future
from typing import Protocol

from cached_attention.tiers.disk_pages import PageRead, PageWrite, ReadOutcome


class PageDisk(Protocol):
    """No method waits for the disk. See `DiskTier`."""

    stride: int
    """Bytes of one page on the disk."""

    @property
    def healthy(self) -> bool: ...

    @property
    def free_slots(self) -> int: ...

    def read(self, pages: Sequence[PageRead]) -> Future[list[ReadOutcome]]: ...

    def write(self, pages: Sequence[PageWrite]) -> Future[list[int | None]]: ...

    def remove(self, slots: Iterable[int]) -> None: ...
