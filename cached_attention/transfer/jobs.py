"""Loads and saves in flight. Each direction has one thread, so that a load never queues behind a save."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import NamedTuple, Protocol

import torch

from cached_attention.chain import PageRun
from cached_attention.checksum import page_checksum
from cached_attention.tiers.host import HostTier
from cached_attention.transfer.copier import PageCopier

NO_CHECKSUM = 0
"""Of a page that never leaves memory."""


class Event(Protocol):
    """Something that must have happened on the device before its memory may be touched."""

    def synchronize(self) -> None: ...


class LoadProgress(Protocol):
    """Told, on the load thread, what has landed."""

    def complete(self, layer: int) -> None: ...

    def fail(self, error: BaseException) -> None: ...


class PageLoad(NamedTuple):
    """One request's part of a load."""

    device_slots: torch.Tensor
    """`[pages * page_size]`, integer: token slots on the device."""
    host_slots: list[int]
    deltas: list[int]
    """Per page: tokens from where it was computed to where it is loaded."""


class PageSave(NamedTuple):
    """Pages on their way to the host; `landed` resolves to checksums when the last layer has."""

    rows: list[int]
    whole: bool
    """Whether every page of the run was taken; False when host memory was too full for the rest."""
    landed: Future[list[int]]


def device_pages(device_slots: torch.Tensor, page_size: int) -> list[int]:
    """The pages that whole runs of `device_slots` fill. Copies from the device when they lie there."""
    return (device_slots[::page_size] // page_size).tolist()


class Transfers:
    """The two transfer threads of one rank.

    Args:
        sealed: saves yield a checksum per page. Only pages that leave memory need one.
    """

    def __init__(self, copier: PageCopier, host: HostTier, page_size: int, *, sealed: bool) -> None:
        self._copier = copier
        self._host = host
        self._page_size = page_size
        self._sealed = sealed
        self._loader = ThreadPoolExecutor(1, thread_name_prefix="cached-attention-load")
        self._saver = ThreadPoolExecutor(1, thread_name_prefix="cached-attention-save")

    def load(self, loads: Sequence[PageLoad], after: Sequence[Event], progress: LoadProgress) -> Future[None]:
        return self._loader.submit(self._load, loads, after, progress)

    def _load(self, loads: Sequence[PageLoad], after: Sequence[Event], progress: LoadProgress) -> None:
        try:
            for event in after:
                event.synchronize()
            pages = [page for load in loads for page in device_pages(load.device_slots, self._page_size)]
            slots = [slot for load in loads for slot in load.host_slots]
            deltas = [delta for load in loads for delta in load.deltas]
            moves = self._copier.moves(pages, slots, deltas) if any(deltas) else None
            for layer in range(self._copier.num_layers):
                if moves is None:
                    self._copier.load(layer, pages, slots)
                else:
                    self._copier.load_rotated(layer, moves)
                progress.complete(layer)
        except BaseException as error:
            progress.fail(error)
            raise

    def save(self, run: PageRun, slots: Sequence[int], after: Sequence[Event]) -> Future[list[int]]:
        """Copy the pages of `run` into `slots`; resolves to their checksums."""
        return self._saver.submit(self._save, run, slots, after)

    def _save(self, run: PageRun, slots: Sequence[int], after: Sequence[Event]) -> list[int]:
        for event in after:
            event.synchronize()
        self._copier.save(device_pages(run.device_slots, self._page_size), slots)
        if not self._sealed:
            return [NO_CHECKSUM] * len(slots)
        return [page_checksum(key, self._host.record(slot)) for key, slot in zip(run.keys, slots, strict=True)]

    def close(self) -> None:
        """Let what runs finish; nothing new starts."""
        self._loader.shutdown(cancel_futures=True)
        self._saver.shutdown(cancel_futures=True)
