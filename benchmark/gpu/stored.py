"""A store under a KV pool, driven as by an engine: saves pages, loads pages, waits for layers."""

from __future__ import annotations

import itertools
import time
from collections.abc import Sequence
from hashlib import sha256
from types import TracebackType
from typing import Self

import torch

from cached_attention.chain import Chain, PageRun
from cached_attention.layout import DevicePool
from cached_attention.position.rotation import Rotation
from cached_attention.store import CachedAttentionStore
from cached_attention.transfer.cuda_copier import CudaCopier
from cached_attention.transfer.layer_wise_load import LayerWiseLoad
from cached_attention.transfer.streams import Event

SAVE_TIMEOUT_S = 120.0
TO_BATCH_S = 200e-6
"""Between queueing and starting a load an engine builds its batch; meanwhile page numbers reach the host."""
POLL_S = 5e-5
"""Between polls, as an engine does other work: a tight loop would take the interpreter from the transfer."""


class Arrival:
    """Waits for the layers of one load; all that a forward knows of the load."""

    def __init__(self, load: LayerWiseLoad) -> None:
        self._layers = load.layers

    def wait(self, layer: int) -> None:
        """Make the current stream wait until `layer` has arrived; without streams, the thread."""
        self._layers[layer].wait()


class StoredPages:
    """A store whose pages all come from one pool.

    Key chains and slots are made in advance, because an engine has them before it calls the store.

    Args:
        pages: capacity of host memory.
        rotations: as the store takes them; needed for `moved_chain`.
    """

    def __init__(self, pool: DevicePool, pages: int, rotations: Sequence[Rotation | None] | None = None) -> None:
        self._pool = pool
        self._numbers = itertools.count()
        self._store = make_store(pool, pages, rotations)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._store.close()

    def ways(self) -> list[str]:
        """How saves and loads of verbatim pages are made, and what both ways took; nothing without a GPU."""
        copier = self._store._transfers.copier
        comparison = copier.comparison if isinstance(copier, CudaCopier) else None
        return comparison.lines() if comparison else []

    def forget(self) -> None:
        """Forget everything that was saved."""
        self._store.reset()

    def new_chain(self, pages: int) -> list[bytes]:
        """Keys of a new conversation."""
        name = f"conversation {next(self._numbers)}"
        return [sha256(f"{name}/{page}".encode()).digest() for page in range(pages)]

    def moved_chain(self, keys: list[bytes], drop: int) -> list[bytes]:
        """Chain of the saved pages `keys` without the first `drop`: the remaining pages move to earlier
        positions, and their keys are rotated when they are loaded."""
        chain = Chain(self.new_chain(len(keys) - drop))
        self._store.alias(chain, [keys[drop:]])
        return chain.keys

    def slots(self, pages: Sequence[int]) -> torch.Tensor:
        """`[len(pages) * page_size]`, int64, on the device: the token slots of these pages of the pool."""
        size = self._pool.layout.page_size
        first = torch.tensor(pages, dtype=torch.int64).unsqueeze(1) * size
        return (first + torch.arange(size)).flatten().to(self._pool.device)

    def save(self, keys: list[bytes], slots: torch.Tensor) -> None:
        """Save the contents of `slots` as the pages `keys`; returns when all bytes are in host memory."""
        self._store.save(PageRun(None, 0, keys, slots))
        deadline = time.monotonic() + SAVE_TIMEOUT_S
        while not self._store.poll():
            if time.monotonic() > deadline:
                raise TimeoutError(f"{len(keys)} pages were not saved in {SAVE_TIMEOUT_S:.0f} s")
            time.sleep(POLL_S)
        if not self._store.pop_save():
            raise RuntimeError(f"the store declined some of {len(keys)} pages")

    def start_load(
        self, keys: list[bytes], slots: torch.Tensor, behind: Sequence[Event] | None = None
    ) -> tuple[int, Arrival]:
        """Start to load the pages `keys` into `slots`; the returned number is for `finish_load`.

        behind: what the load waits for; all work on the current stream unless given.
        """
        number = next(self._numbers)
        request = f"request {number}"
        reserved = self._store.reserve(request, Chain(keys))
        if reserved != len(keys) or not self._store.queue_load(request, keys, slots, self._on_stream()):
            raise RuntimeError(f"the store has {reserved} of {len(keys)} pages")
        if self._pool.device.type == "cuda":
            time.sleep(TO_BATCH_S)
        arrival = Arrival(self._store.start_load(number, self._on_stream() if behind is None else behind))
        self._store.end_pass()
        return number, arrival

    def _on_stream(self) -> list[Event]:
        """What the load waits for: all work queued on the current stream."""
        if self._pool.device.type == "cpu":
            return []
        event = torch.cuda.Event()
        event.record()
        return [event]

    def finish_load(self, number: int) -> None:
        """Call after all layers were waited for.

        Raises:
            RuntimeError: the copies failed.
        """
        if not self._store.finish_load(number):
            raise RuntimeError("the load failed: what was read from the pool is worthless")

    def load(self, keys: list[bytes], slots: torch.Tensor) -> None:
        """Load, and return when all bytes are in the pool."""
        self._finish(*self.start_load(keys, slots))

    def hand_over(self, keys: list[bytes], slots: torch.Tensor, behind: Sequence[Event]) -> float:
        """Seconds that a load behind `behind` keeps the calling thread, of which `TO_BATCH_S` are idle."""
        started = time.perf_counter()
        load = self.start_load(keys, slots, behind)
        seconds = time.perf_counter() - started
        self._finish(*load)
        return seconds

    def _finish(self, number: int, arrival: Arrival) -> None:
        for layer in range(self._pool.layout.num_layers):
            arrival.wait(layer)
        self.finish_load(number)
        if self._pool.device.type == "cuda":
            torch.cuda.synchronize(self._pool.device)


def make_store(
    pool: DevicePool, pages: int, rotations: Sequence[Rotation | None] | None = None
) -> CachedAttentionStore:
    """Makes the store, and with it the transfer engine; nothing else here does."""
    return CachedAttentionStore(pool, pages * pool.layout.stride, rotations=rotations)
