"""Streams and events: work is put on a stream in order, and streams, not callers, wait for each other.

Each device type registers its class of streams. The transfers are written against this file alone, so that
threads without a GPU keep the same order as a GPU must, and it is tested there.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from enum import Enum
from typing import Any, Protocol, TypeVar

import torch

Op = Callable[[], None]
"""Puts work on a stream that runs it in order."""


class Event(Protocol):
    """A point in a stream's work. `torch.cuda.Event` is one."""

    def query(self) -> bool:
        """Whether everything before it is done. Never waits."""

    def wait(self, stream: Any = None) -> None:
        """Let `stream`, or the calling thread's stream, wait. Without streams the thread itself waits."""

    def synchronize(self) -> None:
        """Wait on the CPU: for transfer threads and shutdown only."""


class Priority(Enum):
    LOW = "low"
    HIGH = "high"


class Stream(ABC):
    """Runs what is put on it in order, concurrently with other streams.

    Args:
        device: device of the engine's pool.
        name: for threads and profilers.
        priority: between streams that want the device at the same time.
    """

    @abstractmethod
    def __init__(self, device: torch.device, name: str, priority: Priority) -> None: ...

    @abstractmethod
    def run(self, ops: Iterable[Op]) -> list[Event]:
        """Put `ops` on the stream and return at once, with one event per op: it and all before it are done."""

    @abstractmethod
    def wait(self, event: Event) -> None:
        """Let what is put on the stream from now on start after `event`."""

    def serve_thread(self) -> None:  # noqa: B027 - where a thread has no device of its own there is nothing to do
        """Must be called first by a thread, other than the engine's own, that puts work on the stream."""

    def record(self) -> Event:
        """Event: everything put on the stream so far is done."""
        return self.run([lambda: None])[0]

    @abstractmethod
    def close(self) -> None:
        """Run what is on the stream, then stop."""


S = TypeVar("S", bound=type[Stream])
STREAMS: dict[str, type[Stream]] = {}
"""Stream classes by device type."""


def register(device_type: str) -> Callable[[S], S]:
    """Class decorator: registers the streams of devices of this type."""

    def add(kind: S) -> S:
        STREAMS[device_type] = kind
        return kind

    return add


def make_stream(device: torch.device, name: str, priority: Priority) -> Stream:
    """A new stream of `device`.

    Raises:
        ValueError: no streams are known for such a device.
    """
    if device.type not in STREAMS:
        raise ValueError(f"There are no streams for {device.type!r}; there are for {', '.join(sorted(STREAMS))}.")
    return STREAMS[device.type](device, name, priority)
