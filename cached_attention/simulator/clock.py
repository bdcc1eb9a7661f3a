"""Virtual time."""

from __future__ import annotations


class Clock:
    """Seconds; the simulation sets them."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now
