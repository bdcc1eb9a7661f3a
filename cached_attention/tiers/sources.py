"""What page transfers require of a tier below host memory."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from concurrent.futures import Future
from typing import Protocol

from cached_attention.tiers.page_io import PageRead, PageWrite, ReadOutcome


class PageSource(Protocol):
    """A source of pages; no method waits. See `DiskTier` and `RemoteTier`."""

    stride: int
    """Bytes of one page where it lies."""

    def read(self, pages: Sequence[PageRead]) -> Future[list[ReadOutcome]]: ...


class PageSink(Protocol):
    """Takes pages; no method waits. See `DiskTier` and `RemoteTier`."""

    def write(self, pages: Sequence[PageWrite]) -> Future[list[int | None]]: ...


class SharedPages(PageSource, Protocol):
    """A source of pages in which only the record itself has the checksum. See `RemoteTier`."""

    def checksum(self, buffer: memoryview) -> int: ...


class PageDisk(PageSource, PageSink, Protocol):
    """No method waits for the disk. See `DiskTier`."""

    @property
    def healthy(self) -> bool: ...

    @property
    def free_slots(self) -> int: ...

    @property
    def removing(self) -> int: ...

    @property
    def write_room(self) -> int: ...

    def remove(self, slots: Iterable[int]) -> None: ...
