"""Tracks whether a tier is in service, for reads or for writes."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable

logger = logging.getLogger(__name__)

ERRORS_IN_A_ROW = 5
QUIET_SECONDS = 30.0


class Health:
    """Out of service after consecutive errors, back after a successful probe; probe intervals grow.

    Any thread.

    Args:
        name: store and direction, for the log.
        first_probe, last_probe: first and longest interval between probes, in seconds.
        errors_in_a_row: number of consecutive errors that put it out of service.
        healthy: whether it starts in service; if not, it is probed at once.
    """

    def __init__(
        self,
        name: str,
        first_probe: float = 1.0,
        last_probe: float = 60.0,
        clock: Callable[[], float] = time.monotonic,
        *,
        errors_in_a_row: int = ERRORS_IN_A_ROW,
        healthy: bool = True,
    ) -> None:
        self.healthy = healthy
        self.errors = 0
        self.damaged = 0
        """Pages read back that are not what was written."""
        self.on_outage: Callable[[], None] = lambda: None
        self._name = name
        self._first, self._last = first_probe, last_probe
        self._clock = clock
        self._errors_in_a_row = errors_in_a_row
        self._lock = threading.Lock()
        self._in_a_row = 0
        self._distance = first_probe
        self._probe_at = 0.0
        self._quiet_until = float("-inf")
        self._unsaid = 0

    def succeeded(self) -> None:
        if self._in_a_row and self.healthy:
            with self._lock:
                self._in_a_row = 0

    def failed(self, error: BaseException) -> None:
        with self._lock:
            self.errors += 1
            self._in_a_row += 1
            self.warn(error)
            out = self.healthy and self._in_a_row >= self._errors_in_a_row
            if out:
                self.healthy = False
                self._distance = self._first
                self._probe_at = self._clock() + self._distance
                logger.warning("%s: out of service, errors in a row: %d.", self._name, self._in_a_row)
        if out:
            self.on_outage()

    def found_damage(self) -> None:
        with self._lock:
            self.damaged += 1

    def seconds_to_probe(self) -> float | None:
        """None while healthy; 0 or less: probe now."""
        return None if self.healthy else self._probe_at - self._clock()

    def probed(self, works: bool) -> None:
        with self._lock:
            if works:
                self.healthy = True
                self._in_a_row = 0
                logger.warning("%s: back in service." if self.errors else "%s: now in service.", self._name)
            else:
                self._distance = min(2 * self._distance, self._last)
                self._probe_at = self._clock() + self._distance

    def warn(self, error: BaseException) -> None:
        """Log the error, unless one was logged recently."""
        now = self._clock()
        if now < self._quiet_until:
            self._unsaid += 1
            return
        before = f" ({self._unsaid} more since the last such line)" if self._unsaid else ""
        logger.warning("%s: %s: %s%s", self._name, type(error).__name__, error, before)
        self._quiet_until, self._unsaid = now + QUIET_SECONDS, 0
