"""CUDA's streams, made for the transfers alone."""

from __future__ import annotations

from collections.abc import Iterable

import torch

from cached_attention.transfer.streams import Event, Op, Priority, Stream, register


@register("cuda")
class CudaStream(Stream):
    """Ops are launched at once, on the calling thread.

    torch deals its streams out of a pool of 32 in turns, so that one of them may be the forward's own, and
    saves would queue in front of it. Hence one made here.

    Raises:
        RuntimeError: CUDA made no stream.
    """

    def __init__(self, device: torch.device, name: str, priority: Priority) -> None:
        from cuda.bindings import runtime

        with torch.cuda.device(device):
            least, greatest = _checked(runtime.cudaDeviceGetStreamPriorityRange())
            level = greatest if priority is Priority.HIGH else least
            (handle,) = _checked(runtime.cudaStreamCreateWithPriority(runtime.cudaStreamNonBlocking, level))
        self._stream = torch.cuda.ExternalStream(int(handle), device)

    def serve_thread(self) -> None:
        # A new thread is on GPU 0, and when it leaves a stream torch returns there: each rank would get a context
        # on that GPU, of some hundred MB.
        torch.cuda.set_device(self._stream.device)

    def run(self, ops: Iterable[Op]) -> list[Event]:
        events: list[Event] = []
        with torch.cuda.stream(self._stream):
            for op in ops:
                op()
                # A thread that waits for one sleeps instead of spinning.
                events.append(self._stream.record_event(torch.cuda.Event(blocking=True)))
        return events

    def wait(self, event: Event) -> None:
        event.wait(self._stream)

    def close(self) -> None:
        # Never destroyed: torch's allocator may hold memory that was last used on it. A process makes two.
        self._stream.synchronize()


def _checked(result: tuple) -> tuple:
    error, *values = result
    if error:
        raise RuntimeError(f"CUDA refused a stream for transfers: {error.name}.")
    return tuple(values)
