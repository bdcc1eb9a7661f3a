"""Virtual time."""

from __future__ import annotations


class Clock:
    """Current time in seconds, set by the simulation."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now
