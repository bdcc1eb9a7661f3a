"""A clock that leaves out stalls."""

from __future__ import annotations

import asyncio
import time

TICK = 0.5
"""Seconds."""
STALL = 5.0
"""A tick later than this is due not to a busy loop, but to a suspended machine or a stopped process."""


class Clock:
    """Seconds since creation, except those in which both clients and server were stopped."""

    def __init__(self) -> None:
        self.lost = 0.0
        self._started = time.perf_counter()

    def now(self) -> float:
        return time.perf_counter() - self._started - self.lost

    async def run(self) -> None:
        """Run until cancelled; without it no second is left out."""
        while True:
            before = time.perf_counter()
            await asyncio.sleep(TICK)
            late = time.perf_counter() - before - TICK
            if late > STALL:
                self.lost += late
