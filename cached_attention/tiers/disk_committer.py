"""The single thread that makes changes durable: bytes first, then index rows, in batches."""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from typing import Protocol, TypeVar

from cached_attention.tiers.disk_index import INDEX_ERRORS, Changes, DiskIndex
from cached_attention.tiers.disk_rows import DiskRecord
from cached_attention.tiers.disk_space import TRANSACTION_ROWS
from cached_attention.tiers.health import Health

logger = logging.getLogger(__name__)

TOUCH_SECONDS = 5.0
"""How long updated use counts may wait to be committed with others."""
RETRY_SECONDS = 0.1
DISK_ERRORS = (OSError, *INDEX_ERRORS)
UNEXPECTED = "CachedAttention: a change of the disk's index failed in an unexpected way."
"""The thread goes on all the same: every write waits for it."""
T = TypeVar("T")


class Outcome(Protocol):
    """Notified of what became of the changes, on the committer's thread."""

    def saved(self, records: list[DiskRecord]) -> None: ...

    def unsaved(self, records: list[DiskRecord]) -> None: ...

    def removed(self, slots: list[int]) -> None: ...


class Committer:
    """Collects changes and commits them in batches.

    A batch is what arrived while the previous one was being committed. Failed saves are given up; removals and
    uses are kept and retried, because a slot must not be reused before its row is gone.

    Also brings the disk back into service.

    Args:
        reads, writes: health of the two directions.
        sync: makes the bytes of slots durable; raises OSError.
        probe: raises OSError while the directory does not work.
    """

    def __init__(
        self,
        index: DiskIndex,
        reads: Health,
        writes: Health,
        outcome: Outcome,
        sync: Callable[[Iterable[int]], None],
        probe: Callable[[], None],
    ) -> None:
        self._index, self._outcome = index, outcome
        self._reads, self._writes = reads, writes
        self._sync, self._probe = sync, probe
        self._changed = threading.Condition()
        self._saves: deque[DiskRecord] = deque()
        self._removals: deque[int] = deque()
        self._touches: dict[int, tuple[float, int]] = {}
        self._touch_at = 0.0
        self._retry_at = 0.0
        self._committing = False
        self._hurry = self._closed = False
        self._thread = threading.Thread(target=self._work, name="disk-index", daemon=True)
        reads.on_outage = writes.on_outage = self._wake
        self._thread.start()

    def save(self, records: Iterable[DiskRecord]) -> None:
        """Commit `records`, whose bytes are written but may not be durable yet."""
        with self._changed:
            self._saves.extend(records)
            self._changed.notify()

    def remove(self, slots: Iterable[int]) -> None:
        with self._changed:
            for slot in slots:
                self._touches.pop(slot, None)
                self._removals.append(slot)
            self._changed.notify()

    def touch(self, slot: int, last_use: float, uses: int) -> None:
        with self._changed:
            if not self._touches:
                self._touch_at = time.monotonic() + TOUCH_SECONDS
                self._changed.notify()
            self._touches[slot] = (last_use, uses)

    def flush(self, timeout: float) -> bool:
        """Wait until all changes are committed or given up.

        False if `timeout` (seconds) was too short, or if writes are out of service and changes remain.
        """
        with self._changed:
            self._hurry = True
            self._changed.notify()
            done = self._changed.wait_for(lambda: self._idle or not self._writes.healthy, timeout)
            self._hurry = False
            return done and self._idle

    def close(self, timeout: float) -> bool:
        """Commit pending changes and stop; False if the thread still runs after `timeout` seconds."""
        with self._changed:
            self._closed = True
            self._changed.notify()
        self._thread.join(timeout)
        return not self._thread.is_alive()

    def _wake(self) -> None:
        with self._changed:
            self._changed.notify_all()

    @property
    def _idle(self) -> bool:
        return not (self._saves or self._removals or self._touches or self._committing)

    def _work(self) -> None:
        while True:
            with self._changed:
                while (wait := self._seconds_to_work()) is None or wait > 0:
                    if self._closed and (self._idle or not self._writes.healthy):
                        return
                    self._changed.wait(wait)
                changes = self._take()
                self._committing = True
            self._probe_if_due()
            done = self._writes.healthy and self._commit(changes)
            if not done and changes.saved:
                self._tell(self._outcome.unsaved, changes.saved)
            with self._changed:
                self._committing = False
                if not done:
                    self._keep(changes)
                self._changed.notify_all()

    def _seconds_to_work(self) -> float | None:
        """None: nothing to do; 0 or less: work is due."""
        return min((wait for wait in self._waits() if wait is not None), default=None)

    def _waits(self) -> Iterator[float | None]:
        now = time.monotonic()
        if self._saves:
            yield 0.0
        if not self._closed:
            yield self._writes.seconds_to_probe()
            yield self._reads.seconds_to_probe()
        if self._writes.healthy:
            if self._removals or len(self._touches) >= TRANSACTION_ROWS:
                yield self._retry_at - now
            if self._touches:
                yield (self._retry_at if self._hurry or self._closed else self._touch_at) - now

    def _take(self) -> Changes:
        changes = Changes()
        while self._saves and len(changes.saved) < TRANSACTION_ROWS:
            changes.saved.append(self._saves.popleft())
        room = TRANSACTION_ROWS - len(changes.saved)
        while self._removals and len(changes.removed) < room:
            changes.removed.append(self._removals.popleft())
        room -= len(changes.removed)
        for slot in list(self._touches)[:room]:
            changes.touched[slot] = self._touches.pop(slot)
        return changes

    def _keep(self, changes: Changes) -> None:
        self._removals.extendleft(reversed(changes.removed))
        gone = set(self._removals)
        for slot, use in changes.touched.items():
            if slot not in gone:
                self._touches.setdefault(slot, use)
        self._touch_at = self._retry_at = time.monotonic() + RETRY_SECONDS

    def _commit(self, changes: Changes) -> bool:
        if not (changes.saved or changes.removed or changes.touched):
            return True
        try:
            self._sync(record.slot for record in changes.saved)
            self._index.apply(changes)
        except DISK_ERRORS as error:
            self._writes.failed(error)
            return False
        except Exception as error:
            logger.exception(UNEXPECTED)
            self._writes.failed(error)
            return False
        self._writes.succeeded()
        self._tell(self._outcome.removed, changes.removed)
        self._tell(self._outcome.saved, changes.saved)
        return True

    def _tell(self, tell: Callable[[list[T]], None], changes: list[T]) -> None:
        try:
            tell(changes)
        except Exception:
            logger.exception(UNEXPECTED)

    def _probe_if_due(self) -> None:
        waits = [(health, health.seconds_to_probe()) for health in (self._reads, self._writes)]
        due = [health for health, wait in waits if wait is not None and wait <= 0]
        if not due:
            return
        try:
            self._probe()
            self._index.set_meta("probed", str(time.time()))
            works = True
        except DISK_ERRORS:
            works = False
        except Exception:
            logger.exception(UNEXPECTED)
            works = False
        for health in due:
            health.probed(works)
