"""A disk in virtual time: the same calls as `DiskTier`, without data."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any

from cached_attention.simulator.cost import Cost
from cached_attention.tiers.page_io import PageRead, PageWrite, ReadOutcome


@dataclass
class _Channel:
    """Jobs run one after another, in order of submission."""

    seconds_per_page: float
    latency: float
    jobs: deque[_Job] = field(default_factory=deque)
    free_at: float = 0.0

    def add(self, job: _Job) -> None:
        self.jobs.append(job)

    def next_end(self) -> float:
        return self._end(self.jobs[0]) if self.jobs else math.inf

    def _start(self, job: _Job) -> float:
        return max(self.free_at, job.asked_at)

    def _end(self, job: _Job) -> float:
        return self._start(job) + self.latency + job.pages * self.seconds_per_page

    def advance(self, now: float) -> None:
        """Finish what ends by `now`; jobs that have started can no longer be cancelled."""
        while self.jobs:
            job = self.jobs[0]
            if not job.begun and self._start(job) <= now:
                job.begun = True
                if not job.future.set_running_or_notify_cancel():
                    self.jobs.popleft()
                    continue
            if (end := self._end(job)) > now:
                return
            self.jobs.popleft()
            self.free_at = end
            job.finish()


@dataclass(eq=False)
class _Job:
    future: Future[Any]
    asked_at: float
    pages: int
    finish: Callable[[], None]
    begun: bool = False


class SimulatedDisk:
    """A `PageDisk` of `capacity` pages, with one channel for reads and one for writes.

    Args:
        clock: returns seconds of virtual time.
    """

    healthy = True

    def __init__(self, capacity: int, cost: Cost, clock: Callable[[], float]) -> None:
        self.capacity_slots = capacity
        self.stride = cost.page_bytes
        self.written_pages = 0
        self._clock = clock
        self._free = list(range(capacity - 1, -1, -1))
        self._reads = _Channel(cost.page_bytes / cost.disk_read, cost.disk_latency)
        self._writes = _Channel(cost.page_bytes / cost.disk_write, cost.disk_latency)

    @property
    def free_slots(self) -> int:
        return len(self._free)

    @property
    def removing(self) -> int:
        return 0  # Slots are free at once.

    @property
    def write_room(self) -> int:
        return self.capacity_slots

    def next_event(self) -> float:
        """Time at which the next job ends; infinity if none runs."""
        return min(self._reads.next_end(), self._writes.next_end())

    def advance(self) -> None:
        """Complete the futures of jobs that have ended."""
        now = self._clock()
        self._reads.advance(now)
        self._writes.advance(now)

    def read(self, pages: Sequence[PageRead]) -> Future[list[ReadOutcome]]:
        future: Future[list[ReadOutcome]] = Future()
        outcomes = [ReadOutcome.READ] * len(pages)

        self._reads.add(_Job(future, self._clock(), len(pages), lambda: future.set_result(outcomes)))
        return future

    def write(self, pages: Sequence[PageWrite]) -> Future[list[int | None]]:
        future: Future[list[int | None]] = Future()
        slots: list[int | None] = [self._free.pop() if self._free else None for _ in pages]

        def finish() -> None:
            self.written_pages += sum(slot is not None for slot in slots)
            future.set_result(slots)

        self._writes.add(_Job(future, self._clock(), len(pages), finish))
        return future

    def remove(self, slots: Iterable[int]) -> None:
        self._free.extend(slots)
