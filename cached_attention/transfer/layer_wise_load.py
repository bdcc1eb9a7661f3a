"""Page records on their way to the device, one layer after the other."""

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
    """Per page: tokens from where it was computed to where it is loaded."""
    numbers: PageNumbers | None = None
    """Of its device pages, where the copier wants them."""


def device_pages(device_slots: torch.Tensor, page_size: int) -> torch.Tensor:
    """The pages that whole runs of `device_slots` fill, where these lie."""
    return device_slots[::page_size] // page_size


class LayerWiseLoad(Work):
    """The pages of one batch on their way to the device.

    Which device slots may be written, and when? The load's slots were free when they were given to it, but
    the forward before, which may still run, can own some of them:

    - A request that ended is released when its last result is read; by then the next forward, which has it
      in its batch for one token more, is running. It reads all slots of that request and writes one.
    - A node of the tree is evicted when no request holds it. The forward of the request that held it last
      may be running.
    - A captured graph writes padding into slot 0, which is never given to anybody.
    - A save that reads slots holds the lock of their node until it is reported: they are not free.
    - An earlier load of slots that were freed since is in front, on the same stream.

    So a load waits for everything that was put on the forward's stream when it starts (`after`), which holds
    all forwards before its own: its own is launched later and waits for it, layer by layer. Where `LoadFence`
    knows that the last of them touches none of the slots, it waits for those before that one only. `after` also
    says that the numbers in `device_slots` are computed. Whoever uses the slots next does so on the forward's
    stream, which has waited for the last layer (`CachedAttentionStore.finish_load`), or on the load's.
    """

    layers: Sequence[Event]
    """`layers[l]`: layer l of all pages is there, or will never be, see `error`."""

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
        """Where their numbers are: on the host, if those of all loads have arrived."""
        known = [None if load.numbers is None else load.numbers.known() for load in self._loads]
        arrived = [numbers for numbers in known if numbers is not None]
        if len(arrived) == len(known):
            return np.concatenate(arrived)
        return device_pages(torch.cat([load.device_slots for load in self._loads]), self._page_size)

    def _copy(self, layer: int) -> None:
        self._copier.load(layer, self._moves)

    def wait(self, stream: Any = None) -> None:
        """Let `stream`, or that of the calling thread, wait for all layers; see `Event.wait`."""
        self.layers[-1].wait(stream)

    @property
    def has_ended(self) -> bool:
        """Whether it touches memory no more."""
        return self.layers[-1].query()
