"""CUDA streams that only the transfers use."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch

from cached_attention.transfer.streams import Event, Op, Priority, Stream, register


@register("cuda")
class CudaStream(Stream):
    """Launches ops immediately, on the calling thread.

    torch hands out its streams from a pool of 32, round-robin. One of them could be the forward's own, and saves
    would queue in front of the forward, so this class creates its own stream.

    Raises:
        RuntimeError: CUDA created no stream.
    """

    def __init__(self, device: torch.device, name: str, priority: Priority) -> None:
        from cuda.bindings import runtime

        with torch.cuda.device(device):
            # These bindings bring a CUDA runtime of their own.
            _checked(runtime.cudaSetDevice(torch.cuda.current_device()))
            least, greatest = _checked(runtime.cudaDeviceGetStreamPriorityRange())
            level = greatest if priority is Priority.HIGH else least
            (handle,) = _checked(runtime.cudaStreamCreateWithPriority(runtime.cudaStreamNonBlocking, level))
        self._stream = torch.cuda.ExternalStream(int(handle), device)

    def serve_thread(self) -> None:
        # A new thread starts on GPU 0, and torch returns there when the thread leaves a stream: each rank would
        # get a context of some hundred MB on that GPU.
        torch.cuda.set_device(self._stream.device)

    def run(self, ops: Iterable[Op]) -> list[Event]:
        events: list[Event] = []
        with torch.cuda.stream(self._stream):
            for op in ops:
                op()
                # A thread that waits for a blocking event sleeps instead of spinning.
                events.append(self._stream.record_event(torch.cuda.Event(blocking=True)))
        return events

    def wait(self, event: Event) -> None:
        event.wait(self._stream)

    def close(self) -> None:
        # Never destroyed: torch's allocator may hold memory that was last used on it. A process makes only a few.
        self._stream.synchronize()


def _checked(result: tuple[Any, ...]) -> tuple[Any, ...]:
    error, *values = result
    if error:
        raise RuntimeError(f"CUDA refused a stream for transfers: {error.name}.")
    return tuple(values)
