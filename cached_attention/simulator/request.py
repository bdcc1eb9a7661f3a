"""What arrives, and what became of it."""

from __future__ import annotations

from dataclasses import dataclass

from cached_attention.index import PageKey


@dataclass(frozen=True, slots=True)
class Request:
    """One turn of a conversation. Lengths in tokens, times in seconds."""

    name: str
    arrival: float
    keys: tuple[PageKey, ...]
    """The chain of the prompt, and of the answer as far as it is known beforehand."""
    prompt_pages: int
    """Leading pages of `keys` that are the prompt's."""
    prompt: int
    output: int
    history: int = 0
    """Tokens of the prompt that were computed in turns before, if it is known."""
    turn: int = 0
    """Of its conversation, 0 first."""

    @property
    def prompt_keys(self) -> tuple[PageKey, ...]:
        return self.keys[: self.prompt_pages]


@dataclass(frozen=True, slots=True)
class Hits:
    """Pages of one prompt that were not computed again, by the tier they were in when it was first to run."""

    device: int = 0
    host: int = 0
    """In host memory since they were saved, or fetched for another."""
    ahead: int = 0
    """Brought from the disk while it waited, and there when it was first to run."""
    disk: int = 0
    """Brought from the disk, and still on their way when it was first to run."""

    @property
    def pages(self) -> int:
        return self.device + self.host + self.ahead + self.disk


@dataclass(frozen=True, slots=True)
class Served:
    """A request that was answered. Times in seconds."""

    request: Request
    hits: Hits
    computed: int
    """Tokens of the prompt."""
    started: float
    first_token: float
    queue: int = 0
    """Requests that waited when it was first to run, itself included."""
    wanted: int = 0
    """Distinct pages of their prompts."""

    @property
    def ttft(self) -> float:
        return self.first_token - self.request.arrival

    @property
    def prefill(self) -> float:
        """Seconds from its start to its first token: computing, and waiting for the load."""
        return self.first_token - self.started


@dataclass(frozen=True)
class Outcome:
    """What a simulation did."""

    served: list[Served]
    seconds: float
    """From the first arrival until the last answer."""
    busy: float
    """Seconds in which the machine computed, or waited for a load."""
    written_pages: int
    """To the disk."""
    declined: int
    """Pages that found no room in host memory."""
