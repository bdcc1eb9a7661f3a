"""The time since the epoch, without steps."""

from __future__ import annotations

import time


class EpochClock:
    """Seconds since the epoch, at the pace of a clock that is never set.

    Uses of pages are compared with each other: if the system's time is set back, or forward, they must keep their
    order and their age. Time in suspend counts.
    """

    def __init__(self) -> None:
        self._start = time.time() - _since_boot()

    def __call__(self) -> float:
        return self._start + _since_boot()


def _since_boot() -> float:
    return time.clock_gettime(time.CLOCK_BOOTTIME)
