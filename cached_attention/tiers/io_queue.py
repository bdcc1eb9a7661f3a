"""I/O threads of a tier: reads first, writes while no read is waiting."""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import Enum

logger = logging.getLogger(__name__)

WRITE_PATIENCE = 0.25
"""Seconds after which one write runs beside the reads, so that endless reads do not block all writes."""


class Kind(Enum):
    READ = "read"
    WRITE = "write"


Job = Callable[[], None]


@dataclass(eq=False)
class Batch:
    """Jobs submitted together."""

    since: float
    jobs: deque[Job]
    running: int = 0


class IoQueue:
    """Runs reads before writes, each in order of submission. A job must report its own outcome, whatever happens.

    At most `threads` writes run at a time, and at most one more read of each batch. There are `2 * threads + 1`
    threads, so that a new read finds one even while another batch is stuck on a bad spot of the disk. A write
    starts only while no read is waiting or running, or after `WRITE_PATIENCE`.
    """

    def __init__(self, threads: int, name: str = "disk") -> None:
        self._changed = threading.Condition()
        self._queues: dict[Kind, deque[Batch]] = {kind: deque() for kind in Kind}
        self._reading = self._writing = 0
        self._most_writing, self._most_of_a_read = threads, threads + 1
        self._last_write = 0.0
        self._closed = False
        self._threads = [
            threading.Thread(target=self._work, name=f"{name}-io-{number}", daemon=True)
            for number in range(2 * threads + 1)
        ]
        for thread in self._threads:
            thread.start()

    @property
    def threads(self) -> int:
        """Number of threads, and so of jobs that may run at the same time."""
        return len(self._threads)

    def submit(self, kind: Kind, jobs: Sequence[Job]) -> bool:
        """Queue `jobs`; False after `close`."""
        with self._changed:
            if self._closed:
                return False
            if jobs:
                self._queues[kind].append(Batch(time.monotonic(), deque(jobs)))
                self._changed.notify(len(jobs))
            return True

    def wait_idle(self, timeout: float) -> bool:
        """Wait until no job is waiting or running; False if `timeout` (seconds) was too short."""
        with self._changed:
            return self._changed.wait_for(lambda: self._idle, timeout)

    def close(self, timeout: float) -> bool:
        """Stop after the queued jobs; False if one still runs after `timeout` seconds."""
        deadline = time.monotonic() + timeout
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        for thread in self._threads:
            thread.join(max(0.0, deadline - time.monotonic()))
        return not any(thread.is_alive() for thread in self._threads)

    @property
    def _idle(self) -> bool:
        return not (any(self._queues.values()) or self._reading or self._writing)

    def _work(self) -> None:
        while True:
            with self._changed:
                while (chosen := self._next()) is None:
                    if self._closed and not any(self._queues.values()):
                        return
                    self._changed.wait(self._patience())
                kind, batch = chosen
                job = batch.jobs.popleft()
                if not batch.jobs:
                    self._queues[kind].remove(batch)
                self._count(kind, batch, 1)
            try:
                job()
            except Exception:
                # An unexpected error in one job must not end a thread that all others need.
                logger.exception("CachedAttention: a read or write failed in an unexpected way.")
            finally:
                with self._changed:
                    self._count(kind, batch, -1)
                    self._changed.notify_all()

    def _count(self, kind: Kind, batch: Batch, change: int) -> None:
        batch.running += change
        if kind is Kind.WRITE:
            self._writing += change
            self._last_write = time.monotonic()
        else:
            self._reading += change

    def _next(self) -> tuple[Kind, Batch] | None:
        writes = self._queues[Kind.WRITE]
        if writes and self._patience() == 0.0:
            return Kind.WRITE, writes[0]
        for batch in self._queues[Kind.READ]:
            if batch.running < self._most_of_a_read:
                return Kind.READ, batch
        may_write = writes and (self._closed or not self._reading) and self._writing < self._most_writing
        return (Kind.WRITE, writes[0]) if may_write else None

    def _patience(self) -> float | None:
        """Seconds until a waiting write may run beside reads; None if only a change of state can let one run."""
        if not self._queues[Kind.WRITE] or self._writing:
            return None
        since = max(self._last_write, self._queues[Kind.WRITE][0].since)
        return max(0.0, since + WRITE_PATIENCE - time.monotonic())
