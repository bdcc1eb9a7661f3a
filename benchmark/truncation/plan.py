"""Which tokens a conversation loses, and when, once it outgrows its window."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple


class Period(NamedTuple):
    """Tokens `start` to `end` of a conversation, read while the `dropped` tokens after the sink are missing."""

    truncations: int
    start: int
    end: int
    dropped: int


@dataclass(frozen=True)
class Plan:
    """The truncation rule, in tokens: the first `sink` stay, and of the others the most recent.

    Whenever `window` tokens are full, the oldest `step` after the sink are dropped: what is dropped depends on
    the length of the conversation alone.
    """

    window: int
    step: int
    sink: int

    def __post_init__(self) -> None:
        if not 0 <= self.sink < self.window - self.step < self.window:
            raise ValueError(
                f"window {self.window}, step {self.step}, sink {self.sink}: the step must be at least one token, "
                "and the sink and one more token must stay when it is dropped"
            )

    def periods(self, tokens: int) -> Iterator[Period]:
        """The periods of a conversation of `tokens`, from truncation to truncation."""
        start = 0
        ends = range(self.window, max(tokens, self.window) + self.step, self.step)
        for truncations, end in enumerate(ends):
            yield Period(truncations, start, min(end, tokens), truncations * self.step)
            start = end
