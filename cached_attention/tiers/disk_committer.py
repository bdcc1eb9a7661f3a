"""The one thread that makes changes durable: bytes first, then the index rows, many at a time."""

from __future__ import annotations

import sqlite3
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable
from typing import Protocol

from cached_attention.tiers.disk_health import Health
from cached_attention.tiers.disk_index import Changes, DiskIndex, DiskRecord
from cached_attention.tiers.disk_space import TRANSACTION_ROWS

TOUCH_SECONDS = 5.0
"""How long new use counts may wait for company."""
RETRY_SECONDS = 0.1
DISK_ERRORS = (OSError, sqlite3.Error)


class Outcome(Protocol):
    """Who wants to know what became of the changes; called on the committer's thread."""

    def saved(self, records: list[DiskRecord]) -> None: ...

    def unsaved(self, records: list[DiskRecord]) -> None: ...

    def removed(self, slots: list[int]) -> None: ...


class Committer:
    """Collects changes and commits them in batches.

    A batch is what came while the batch before was being committed. Saves that fail are given up;
    removals and uses are kept and tried again, for a slot must not be used anew before its row is gone.

    Args:
        sync: makes the bytes of slots durable; raises OSError.
        probe: raises OSError while the directory does not work.
    """

    def __init__(
        self,
        index: DiskIndex,
        health: Health,
        outcome: Outcome,
        sync: Callable[[Iterable[int]], None],
        probe: Callable[[], None],
    ) -> None:
        self.commits = 0
        self._index, self._health, self._outcome = index, health, outcome
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
        self._thread.start()

    def save(self, records: Iterable[DiskRecord]) -> None:
        """The bytes of `records` are written, though perhaps not durable yet."""
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
        """Wait until all is committed, or given up; False where `timeout` (seconds) was too short."""
        with self._changed:
            self._hurry = True
            self._changed.notify()
            done = self._changed.wait_for(lambda: self._idle or not self._health.healthy, timeout)
            self._hurry = False
            return done and self._idle

    def close(self, timeout: float) -> bool:
        """Commit what is there and end; False if the thread still runs after `timeout` seconds."""
        with self._changed:
            self._closed = True
            self._changed.notify()
        self._thread.join(timeout)
        return not self._thread.is_alive()

    @property
    def _idle(self) -> bool:
        return not (self._saves or self._removals or self._touches or self._committing)

    def _work(self) -> None:
        while True:
            with self._changed:
                while (wait := self._seconds_to_work()) is None or wait > 0:
                    if self._closed and (self._idle or not self._health.healthy):
                        return
                    self._changed.wait(wait)
                changes = self._take()
                self._committing = True
            self._probe_if_due()
            done = self._health.healthy and self._commit(changes)
            if not done and changes.saved:
                self._outcome.unsaved(changes.saved)
            with self._changed:
                self._committing = False
                if not done:
                    self._keep(changes)
                self._changed.notify_all()

    def _seconds_to_work(self) -> float | None:
        """None: nothing to do; 0 or less: now."""
        now = time.monotonic()
        to_probe = self._health.seconds_to_probe()
        if self._saves:
            return 0.0
        if to_probe is not None:
            return None if self._closed else to_probe
        if self._removals or len(self._touches) >= TRANSACTION_ROWS:
            return self._retry_at - now
        if self._touches:
            return self._retry_at - now if self._hurry or self._closed else self._touch_at - now
        return None

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
            self._health.failed(error)
            return False
        self._health.succeeded()
        self.commits += 1
        self._outcome.removed(changes.removed)
        self._outcome.saved(changes.saved)
        return True

    def _probe_if_due(self) -> None:
        wait = self._health.seconds_to_probe()
        if wait is None or wait > 0:
            return
        try:
            self._probe()
            self._index.set_meta("probed", str(time.time()))
        except DISK_ERRORS:
            self._health.probed(works=False)
        else:
            self._health.probed(works=True)
