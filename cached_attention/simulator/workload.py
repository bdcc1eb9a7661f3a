"""When requests arrive."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Protocol

from cached_attention.simulator.request import Request


class Workload(Protocol):
    """Source of a simulation's requests."""

    def __len__(self) -> int:
        """Total number of requests."""

    def due(self, now: float, waiting: int) -> Request | None:
        """The next request that has arrived by `now`, while `waiting` others wait; each is returned once."""

    def next_arrival(self) -> float:
        """Arrival time of the next request, if known; infinity if another event must happen first."""

    def answered(self, request: Request, now: float) -> None:
        """`request` has produced its last token."""


class OnTime:
    """Requests arrive at their given times, whatever the machine does."""

    def __init__(self, requests: Sequence[Request]) -> None:
        self._requests = requests
        self._next = 0

    def __len__(self) -> int:
        return len(self._requests)

    def due(self, now: float, waiting: int) -> Request | None:
        if self.next_arrival() > now:
            return None
        self._next += 1
        return self._requests[self._next - 1]

    def next_arrival(self) -> float:
        return self._requests[self._next].arrival if self._next < len(self._requests) else math.inf

    def answered(self, request: Request, now: float) -> None:
        """Other requests do not depend on it."""


class Saturated:
    """The machine is so slow that `queue` requests are always waiting; one arrives when another starts to run."""

    def __init__(self, requests: Sequence[Request], queue: int) -> None:
        if queue < 1:
            raise ValueError(f"queue is {queue}: at least 1 request must wait.")
        self._requests = requests
        self._queue = queue
        self._next = 0

    def __len__(self) -> int:
        return len(self._requests)

    def due(self, now: float, waiting: int) -> Request | None:
        if waiting >= self._queue or self._next == len(self._requests):
            return None
        self._next += 1
        return replace(self._requests[self._next - 1], arrival=now)

    def next_arrival(self) -> float:
        return math.inf

    def answered(self, request: Request, now: float) -> None:
        """Other requests do not depend on it."""
