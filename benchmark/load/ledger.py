"""Results from a server under load."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import NamedTuple

EVERY = 10
"""One in this many answers is kept for comparison with the reference."""


class Answer(NamedTuple):
    """One answered turn; `at` in seconds since the start, `ttft` and `e2e` since the request.

    `cached`: prompt tokens by the tier they came from, as reported by the server.

    `stalled`: clients and server were stopped meanwhile, see `Clock`, so its times mean nothing.
    """

    at: float
    ttft: float
    e2e: float
    prompt_tokens: int
    cached: dict[str, int]
    stalled: bool = False


class Kept(NamedTuple):
    """An answer kept for comparison."""

    prompt: list[int]
    output_ids: list[int]


@dataclass
class Ledger:
    answers: list[Answer] = field(default_factory=list)
    kept: list[Kept] = field(default_factory=list)
    statuses: Counter[tuple[str, int]] = field(default_factory=Counter)
    """By path and HTTP status; a stream that ends in an error counts with the status of the error."""
    aborts: Counter[str] = field(default_factory=Counter)
    """Requests aborted by their client, by outcome."""
    failures: Counter[str] = field(default_factory=Counter)
    """Unexpected failures: dropped connections, aborts by the server, damage."""

    def answered(self, answer: Answer, prompt: list[int], output_ids: list[int]) -> None:
        if len(self.answers) % EVERY == 0:
            self.kept.append(Kept(prompt, output_ids))
        self.answers.append(answer)

    @property
    def server_errors(self) -> int:
        """Answers with a status of 500 or above."""
        return sum(count for (_, status), count in self.statuses.items() if status >= 500)
