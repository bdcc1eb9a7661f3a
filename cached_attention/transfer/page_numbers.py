"""Copies the numbers of device pages, which are computed on the device, to the host."""

from __future__ import annotations

import numpy as np
import torch

from cached_attention.transfer.streams import Event, Stream
from cached_attention.transfer.work import Step, Work


class PageNumbers:
    """Numbers of a run of whole pages; their copy starts at once.

    Args:
        device_slots: `[pages * page_size]`, integer: token slots, computed by the time `stream` gets to the copy.
            Copied unchanged, so that nothing is allocated on the device.
        stream: stream that copies them.
    """

    def __init__(self, device_slots: torch.Tensor, page_size: int, stream: Stream) -> None:
        self._device_slots = device_slots
        self._page_size = page_size
        work = Work()
        ended: Event
        (ended,) = stream.run([work.step(self._copy)])
        self._step = Step(work, ended)

    def _copy(self) -> None:
        there = self._device_slots
        self._here = torch.empty(there.shape, dtype=there.dtype, pin_memory=there.is_cuda)
        self._here.copy_(there, non_blocking=True)

    def known(self) -> np.ndarray | None:
        """`[pages]`, integer; None until they have arrived. Never waits."""
        return self._pages() if self._step.has_succeeded else None

    def wait_here(self) -> np.ndarray:
        """Like `known`, but the calling thread waits.

        Raises:
            RuntimeError: the copy failed.
        """
        self._step.wait_here()
        return self._pages()

    def _pages(self) -> np.ndarray:
        return self._here[:: self._page_size].numpy() // self._page_size
