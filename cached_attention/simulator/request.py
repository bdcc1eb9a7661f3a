"""Requests of a simulation, and their outcomes."""

from __future__ import annotations

from dataclasses import dataclass

from cached_attention.index import PageKey


@dataclass(frozen=True, slots=True)
class Request:
    """One turn of a conversation. Lengths in tokens, times in seconds."""

    name: str
    arrival: float
    keys: tuple[PageKey, ...]
    """Chain of the prompt, and of the answer as far as it is known in advance."""
    prompt_pages: int
    """Leading pages of `keys` that belong to the prompt."""
    prompt: int
    output: int
    history: int = 0
    """Tokens of the prompt that were computed in earlier turns, if known."""
    turn: int = 0
    """Index within its conversation, from 0."""

    @property
    def prompt_keys(self) -> tuple[PageKey, ...]:
        return self.keys[: self.prompt_pages]


@dataclass(frozen=True, slots=True)
class Hits:
    """Pages of one prompt that were not recomputed, by the tier they were in when it was first due to run."""

    device: int = 0
    host: int = 0
    """In host memory since they were saved, or fetched for another request."""
    ahead: int = 0
    """Fetched from disk while it waited, and present when it was first due to run."""
    disk: int = 0
    """Fetched from disk, and still in flight when it was first due to run."""

    @property
    def pages(self) -> int:
        return self.device + self.host + self.ahead + self.disk


@dataclass(frozen=True, slots=True)
class Served:
    """A served request. Times in seconds."""

    request: Request
    hits: Hits
    computed: int
    """Tokens of the prompt that were computed."""
    started: float
    first_token: float
    queue: int = 0
    """Requests waiting when it started, including itself."""
    wanted: int = 0
    """Distinct pages of their prompts."""

    @property
    def ttft(self) -> float:
        return self.first_token - self.request.arrival

    @property
    def prefill(self) -> float:
        """Seconds from its start to its first token: computation, and waiting for the load."""
        return self.first_token - self.started


@dataclass(frozen=True)
class Outcome:
    """Result of a simulation."""

    served: list[Served]
    seconds: float
    """From the first arrival to the last answer."""
    busy: float
    """Seconds in which the machine computed or waited for a load."""
    written_pages: int
    """Pages written to disk."""
    declined: int
    """Pages for which host memory had no room."""
