"""Time that counts."""

from __future__ import annotations

import asyncio
import time

TICK = 0.5
"""Seconds."""
STALL = 5.0
"""A tick that comes later than this is not a busy loop, but a machine that was suspended or a process stopped."""


class Clock:
    """Seconds since it was made, without those in which clients and server alike were stopped."""

    def __init__(self) -> None:
        self.lost = 0.0
        self._started = time.perf_counter()

    def now(self) -> float:
        return time.perf_counter() - self._started - self.lost

    async def run(self) -> None:
        """Until it is cancelled; without it every second counts."""
        while True:
            before = time.perf_counter()
            await asyncio.sleep(TICK)
            late = time.perf_counter() - before - TICK
            if late > STALL:
                self.lost += late
