"""What SGLang's KV pools wait for before they hand out a layer."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any, Protocol


class Layer(Protocol):
    """A layer on its way. An `Event` is one."""

    def wait(self, stream: Any = None) -> None:
        """Let the current stream, or the thread if there is none, wait until the layer has landed."""


class Several:
    """Layers that are waited for as one."""

    def __init__(self, *layers: Layer) -> None:
        self._layers = layers

    def wait(self, stream: Any = None) -> None:
        for layer in self._layers:
            layer.wait(stream)


class LayerEvents:
    """The linker's `layer_done_counter`: the forward's stream waits for a layer, the CPU does not.

    Upstream's `LayerWiseLoadCounter` blocks the thread that launches the forward until a layer has landed. A
    stream can wait for an event before it has happened, so here that thread runs ahead, as it does without loads.
    Without streams that thread computes the forward itself, and waits.

    Args:
        waited: called per batch with the seconds that this thread waited for its layers; None with streams,
            because it does not wait then.
    """

    def __init__(self, num_layers: int, waited: Callable[[float], None] | None = None) -> None:
        self.num_layers = num_layers
        self._waited = waited
        self.reset()

    def reset(self) -> None:
        self.consumer_index = -1
        self._last = -1
        self._layers: dict[int, Sequence[Layer]] = {}
        self._first: dict[int, Sequence[Layer]] = {}
        self._seconds: dict[int, float] = {}

    def next_batch(self) -> int:
        self._last += 1
        return self._last

    def add(self, batch: int, layers: Sequence[Layer], first: Sequence[Layer] = ()) -> None:
        """`layers`: those of the pool; `first`: those that the forward reads without waiting for them."""
        self._layers[batch], self._first[batch] = layers, first
        self._seconds[batch] = 0.0

    def discard(self, batch: int) -> None:
        """The forward of `batch` was launched."""
        del self._layers[batch], self._first[batch]
        seconds = self._seconds.pop(batch)
        if self._waited is not None:
            self._waited(seconds)

    def set_consumer(self, index: int) -> None:
        """The forward launched next is that of batch `index`; -1: of a batch without loads."""
        self.consumer_index = index
        for layer in self._first.get(index, ()):
            self._wait(layer)

    def wait_until(self, threshold: int) -> None:
        """The current stream is about to read layer `threshold`."""
        if (layers := self._layers.get(self.consumer_index)) is not None:
            self._wait(layers[threshold])

    def _wait(self, layer: Layer) -> None:
        started = time.monotonic()
        layer.wait()
        self._seconds[self.consumer_index] += time.monotonic() - started
