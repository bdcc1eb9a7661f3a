"""Inputs and results of the tiers below host memory."""

from __future__ import annotations

from concurrent.futures import Future
from dataclasses import dataclass
from enum import Enum
from typing import Generic, NamedTuple, TypeVar


class PageWrite(NamedTuple):
    key: bytes
    """32 bytes."""
    parent: bytes | None
    """Key of the preceding page; None at the start of a prompt."""
    base_position: int
    checksum: int
    """`page_checksum` of the key and the record without padding."""
    last_use: float
    """Seconds since the epoch."""
    uses: int
    buffer: memoryview
    """`slot_stride` bytes, aligned to 4,096; must not change until the write is done."""


class PageRead(NamedTuple):
    key: bytes
    slot: int
    checksum: int
    buffer: memoryview
    """`slot_stride` bytes, aligned to 4,096, writable; overwritten whatever the outcome."""


class ReadOutcome(Enum):
    READ = "read"
    """The buffer holds the page."""
    LOST = "lost"
    """The record is damaged, short, foreign or unreadable: remove the page."""
    UNAVAILABLE = "unavailable"
    """Not attempted: out of service, closing, or cancelled. The page may still exist: keep it."""


@dataclass
class DiskStats:
    """Counts since the tier was opened, in pages."""

    lost: int = 0
    """Found damaged, short, foreign or unreadable when they were read."""
    declined: int = 0
    """Writes not started: full, too much queued, or out of service."""
    failed: int = 0
    """Writes started but given up."""
    dropped: int = 0
    """Found when the store was opened but not kept: expired, beyond the capacity, or damaged."""


T = TypeVar("T")


class Ticket(Generic[T]):
    """Results of one call, one per page, as they arrive. Not thread-safe, except for `future`."""

    def __init__(self, count: int, default: T) -> None:
        self.future: Future[list[T]] = Future()
        self.results = [default] * count
        self._missing = count
        self._begun = self._cancelled = False

    def begin(self) -> bool:
        """Make the future uncancellable; False if it was cancelled before."""
        if not self._begun:
            self._begun = True
            self._cancelled = not self.future.set_running_or_notify_cancel()
        return not self._cancelled

    def settle(self, place: int, result: T) -> None:
        self.results[place] = result
        self._missing -= 1

    @property
    def settled(self) -> bool:
        return self._missing == 0

    def finish(self) -> None:
        """Complete the future, with defaults for missing results; call once."""
        if not self._cancelled:
            self.future.set_result(self.results)
