"""Cost model: how long the machine takes."""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class Cost:
    """A linear model of one replica, all its GPUs together. Times in seconds, bandwidths in bytes per second."""

    prefill_token: float = 1e-4
    """Per computed token of a prompt."""
    prefill_base: float = 0.01
    """Per prompt."""
    decode_base: float = 0.02
    """Per step, whatever the batch."""
    decode_request: float = 2e-4
    """Per step and running request."""
    batch: int = 64
    """Most requests that run at the same time."""
    page_bytes: int = 1 << 26
    layers: int = 32
    host_bandwidth: float = 26e9
    """Host memory to device."""
    disk_read: float = math.inf
    disk_write: float = math.inf
    disk_latency: float = 1e-4
    overlap: bool = True
    """Load layer by layer while earlier layers compute (the paper's section 3.2.1); else load first."""

    def load(self, pages: int) -> float:
        return pages * self.page_bytes / self.host_bandwidth

    def compute(self, tokens: int) -> float:
        return self.prefill_base + tokens * self.prefill_token

    def prefill(self, tokens: int, loaded_pages: int) -> float:
        """Seconds until the first token: computing part of the prompt, and loading pages of it from host memory.

        With overlap, layer l waits for its own pages and for layer l - 1: the slower of the two sets the pace,
        and one layer of the faster is added.
        """
        load, compute = self.load(loaded_pages), self.compute(tokens)
        if not self.overlap:
            return load + compute
        return max(load, compute) + min(load, compute) / self.layers

    def decode(self, running: int) -> float:
        """Seconds of one step of `running` requests."""
        return self.decode_base + running * self.decode_request
