"""How long the forward waits for layers that are being loaded."""

from __future__ import annotations

import time
from collections.abc import Callable

from sglang.srt.mem_cache.unified_cache.unified_cache_linker import LayerWiseLoadCounter


class TimedLoadCounter(LayerWiseLoadCounter):
    """Upstream's, and adds up the waits of each batch.

    Args:
        waited: called when a batch is finished, with the seconds that its forward waited in all.
    """

    def __init__(self, num_layers: int, waited: Callable[[float], None]) -> None:
        super().__init__(num_layers)
        self._waited = waited
        self._seconds: dict[int, float] = {}

    def wait_until(self, threshold: int) -> None:
        index, started = self.consumer_index, time.monotonic()
        super().wait_until(threshold)
        if index in self.futures:
            self._seconds[index] = self._seconds.get(index, 0.0) + time.monotonic() - started

    def finish(self, index: int) -> bool:
        loaded = index in self.futures
        landed = super().finish(index)
        if loaded:
            self._waited(self._seconds.pop(index, 0.0))
        return landed

    def reset(self) -> None:
        super().reset()
        self._seconds.clear()
