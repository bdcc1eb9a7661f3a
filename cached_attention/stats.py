"""Counters of a store. They only grow while the store lives; `reset` empties tiers, not counters."""

from __future__ import annotations

import threading
import time
from collections import Counter, defaultdict
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Protocol, TypeVar

T = TypeVar("T")


class Direction(StrEnum):
    """Direction of a page transfer, seen from host memory; the tier named with it is the lower of the two."""

    SAVE = "save"
    """From the device to host memory."""
    LOAD = "load"
    """From host memory to the device."""
    DEMOTE = "demote"
    """From host memory to a tier below."""
    FETCH = "fetch"
    """From a tier below to host memory."""


class Reason(StrEnum):
    """Why pages left a tier."""

    ROOM = "room"
    """Their space was needed for other pages."""
    TTL = "ttl"
    """Not used for longer than the time to live."""
    HINT = "hint"
    """A client said that the conversation is over."""
    DAMAGE = "damage"
    """The data read back is not what was written, or could not be read."""
    FLUSH = "flush"
    """The whole cache was emptied."""


@dataclass
class Flow:
    """Transfers between two tiers in one direction."""

    pages: int = 0
    transfers: int = 0
    seconds: float = 0.0
    """Sum over the transfers of the time from request to completion; transfers may overlap."""


class Observer(Protocol):
    """Notified of each duration, in seconds, as it is counted. Must be quick."""

    def transferred(self, direction: Direction, tier: str, seconds: float) -> None:
        """Called on any thread."""

    def load_waited(self, seconds: float) -> None:
        """Called on the thread that calls the store."""


@dataclass
class StoreStats:
    """Counts since the store was created, in pages unless said otherwise."""

    saved: int = 0
    declined: int = 0
    """Pages not saved: host memory was full of pages in use, or the preceding page was not in the store."""
    failed: int = 0
    """Pages not saved because their copy failed."""
    fetched: int = 0
    lost: int = 0
    """Pages that were damaged, foreign or unreadable when read back."""
    aliased: int = 0
    """Pages that took the bytes of another one, at another position."""
    lookups: int = 0
    """Prompts looked up in the remote store."""
    recomputed: int = 0
    """Pages recomputed because waiting for them would have taken longer."""
    given_up: int = 0
    """Requests that recomputed rather than waited."""
    prompts: int = 0
    """Requests whose prompt ran."""
    prompt_tokens: int = 0
    hit_tokens: Counter[str] = field(default_factory=Counter)
    """Prompt tokens that were not computed, by the tier they came from, including `device`."""
    truncated_prompts: int = 0
    truncated_tokens: int = 0
    load_waits: int = 0
    """Batches that had pages to load."""
    load_wait: float = 0.0
    """Seconds that they waited for layers: the part of loading not hidden by computation."""
    gone: Counter[tuple[str, Reason]] = field(default_factory=Counter)
    """Pages that left a tier, per tier and reason."""
    flows: defaultdict[tuple[Direction, str], Flow] = field(default_factory=lambda: defaultdict(Flow))
    observer: Observer | None = None
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def counters(self) -> dict[str, int]:
        """Counters that every store has."""
        return {
            "loaded": self.flows[Direction.LOAD, "host"].pages,
            "saved": self.saved,
            "declined": self.declined,
            "failed": self.failed,
            "expired": sum(pages for (_, reason), pages in self.gone.items() if reason is Reason.TTL),
            "evicted": self.gone["host", Reason.ROOM],
        }

    def left(self, tier: str, reason: Reason, pages: int) -> None:
        if pages:
            self.gone[tier, reason] += pages

    def prompt_ran(self, tokens: int, hits: dict[str, int]) -> None:
        """Count a prompt of `tokens` tokens that runs; `hits`: cached tokens per tier."""
        self.prompts += 1
        self.prompt_tokens += tokens
        self.hit_tokens.update(hits)

    def truncated(self, tokens: int) -> None:
        self.truncated_prompts += 1
        self.truncated_tokens += tokens

    def load_waited(self, seconds: float) -> None:
        """Count a batch whose forward waited this long in total for pages of its layers."""
        self.load_waits += 1
        self.load_wait += seconds
        if self.observer is not None:
            self.observer.load_waited(seconds)

    def watch(self, direction: Direction, tier: str, future: Future[T], moved: Callable[[T], int]) -> Future[T]:
        """Count a transfer that has just begun, once it ends, on the thread that ends it; returns `future`.

        `moved`: pages, from the future's result. Transfers that failed or moved nothing are not counted.
        """
        started = time.monotonic()

        def ended(done: Future[T]) -> None:
            if not done.cancelled() and done.exception() is None and (pages := moved(done.result())):
                self.transferred(direction, tier, pages, time.monotonic() - started)

        future.add_done_callback(ended)
        return future

    def transferred(self, direction: Direction, tier: str, pages: int, seconds: float) -> None:
        """Count pages that arrived `seconds` after they were requested. Any thread."""
        with self._lock:
            flow = self.flows[direction, tier]
            flow.pages += pages
            flow.transfers += 1
            flow.seconds += seconds
        if self.observer is not None:
            self.observer.transferred(direction, tier, seconds)
