"""Timestamps in the work of a device."""

from __future__ import annotations

import time

import torch

Mark = float | torch.cuda.Event


class Stopwatch:
    """Marks when the device reaches a point in its work; on a GPU that is later than when Python does."""

    def __init__(self, device: str) -> None:
        self._device = device
        self._on_gpu = device != "cpu"

    def synchronize(self) -> None:
        """Wait until the device has nothing left to do."""
        if self._on_gpu:
            torch.cuda.synchronize(self._device)

    def mark(self) -> Mark:
        if not self._on_gpu:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    @staticmethod
    def seconds(start: Mark, end: Mark) -> float:
        """Seconds between two marks; call after `synchronize`."""
        if isinstance(start, float) and isinstance(end, float):
            return end - start
        assert isinstance(start, torch.cuda.Event)
        assert isinstance(end, torch.cuda.Event)
        return start.elapsed_time(end) / 1000
