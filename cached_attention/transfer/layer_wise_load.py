"""Page records on their way to the device, layer by layer."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch

from cached_attention.transfer.copier import PageCopier
from cached_attention.transfer.page_numbers import PageNumbers
from cached_attention.transfer.streams import Event, Op
from cached_attention.transfer.work import Work


class PageLoad(NamedTuple):
    """One request's part of a load."""

    device_slots: torch.Tensor
    """`[pages * page_size]`, integer: token slots on the device."""
    host_slots: list[int]
    deltas: list[int]
    """Per page: tokens from the position where it was computed to the one where it is loaded."""
    numbers: PageNumbers | None = None
    """Numbers of its device pages, if the copier wants them."""


def device_pages(device_slots: torch.Tensor, page_size: int) -> torch.Tensor:
    """Numbers of the whole pages that `device_slots` fill, on the same device."""
    return device_slots[::page_size] // page_size


class LayerWiseLoad(Work):
    """The pages of one batch on their way to the device.

    When may the device slots be written? They were free when they were allocated to the load, but the previous
    forward, which may still be running, can use some of them:

    - A finished request is released when its last result is read; by then the next forward is running, with the
      request in its batch for one more token. It reads all slots of that request and writes one.
    - A node of the tree is evicted when no request holds it. The forward of the last request that held it may
      still be running.
    - A captured graph writes padding into slot 0, which is never allocated.
    - A save that reads slots holds the lock of their node until it is reported, so they are not free.
    - An earlier load into slots that were freed since is ahead on the same stream.

    So a load waits for everything that is on the forward's stream when it starts (`after`). That includes all
    forwards before its own, which is launched later and waits for the load, layer by layer. If `LoadFence` knows
    that the last of them touches none of the slots, the load waits only for the ones before it. `after` also
    implies that the numbers in `device_slots` are computed. The next user of the slots runs on the forward's
    stream, which has waited for the last layer (`CachedAttentionStore.finish_load`), or on the load's.
    """

    layers: Sequence[Event]
    """`layers[l]`: layer l of all pages has landed, or never will, see `error`."""

    def __init__(self, copier: PageCopier, loads: Sequence[PageLoad], page_size: int) -> None:
        self._copier = copier
        self._loads = loads
        self._page_size = page_size

    @property
    def pages(self) -> int:
        return sum(len(load.host_slots) for load in self._loads)

    def ops(self) -> list[Op]:
        steps: list[Op] = [self._prepare]
        steps += [partial(self._copy, layer) for layer in range(self._copier.num_layers)]
        return list(map(self.step, steps))

    def _prepare(self) -> None:
        host_slots = [slot for load in self._loads for slot in load.host_slots]
        deltas = [delta for load in self._loads for delta in load.deltas]
        self._moves = self._copier.moves(self._device_pages(), host_slots, deltas)

    def _device_pages(self) -> np.ndarray | torch.Tensor:
        """Page numbers of all loads: on the host if all have arrived there, else on the device."""
        known = [None if load.numbers is None else load.numbers.known() for load in self._loads]
        arrived = [numbers for numbers in known if numbers is not None]
        if len(arrived) == len(known):
            return np.concatenate(arrived)
        return device_pages(torch.cat([load.device_slots for load in self._loads]), self._page_size)

    def _copy(self, layer: int) -> None:
        self._copier.load(layer, self._moves)

    def wait(self, stream: Any = None) -> None:
        """Let `stream`, or the calling thread's stream, wait for all layers; see `Event.wait`."""
        self.layers[-1].wait(stream)

    @property
    def has_ended(self) -> bool:
        """Whether the load no longer touches memory."""
        return self.layers[-1].query()
