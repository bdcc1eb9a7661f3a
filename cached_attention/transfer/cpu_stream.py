"""Streams for devices that have none: a thread each."""

from __future__ import annotations

import threading
from collections.abc import Iterable
from queue import SimpleQueue
from typing import Any

import torch

from cached_attention.transfer.streams import Event, Op, Priority, Stream, register


class CpuEvent:
    """A point in a thread's work. The engine computes on the calling thread, so that is the one that waits."""

    def __init__(self) -> None:
        self._happened = threading.Event()
        self._error: BaseException | None = None

    def happen(self, error: BaseException | None = None) -> None:
        self._error = error
        self._happened.set()

    def query(self) -> bool:
        return self._happened.is_set()

    def wait(self, stream: Any = None) -> None:
        self._happened.wait() if stream is None else stream.wait(self)

    def synchronize(self) -> None:
        """Raises what the op raised."""
        self._happened.wait()
        if self._error is not None:
            raise self._error


@register("cpu")
class CpuStream(Stream):
    """A thread that runs ops in order. Priorities are left to the operating system."""

    def __init__(self, device: torch.device, name: str, priority: Priority) -> None:
        self._ops: SimpleQueue[tuple[Op, CpuEvent | None] | None] = SimpleQueue()
        self._thread = threading.Thread(target=self._work, name=f"cached-attention-{name}", daemon=True)
        self._thread.start()

    def run(self, ops: Iterable[Op]) -> list[Event]:
        events: list[Event] = []
        for op in ops:
            event = CpuEvent()
            self._ops.put((op, event))
            events.append(event)
        return events

    def wait(self, event: Event) -> None:
        self._ops.put((event.synchronize, None))

    def close(self) -> None:
        self._ops.put(None)
        self._thread.join()

    def _work(self) -> None:
        error: BaseException | None = None
        while (item := self._ops.get()) is not None:
            op, event = item
            error = error or self._attempt(op)
            # An op after a wait for a failed event does not run: its event gets the error.
            if event is not None:
                event.happen(error)
                error = None

    @staticmethod
    def _attempt(op: Op) -> BaseException | None:
        try:
            op()
        except BaseException as error:  # noqa: BLE001  It is raised to whoever waits for the event.
            return error
        return None
