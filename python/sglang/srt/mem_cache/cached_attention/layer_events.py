"""What SGLang's KV pools ask before they hand out a layer."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any, Protocol


class Layer(Protocol):
    """A layer on its way. An `Event` is one."""

    def wait(self, stream: Any = None) -> None:
        """Let the current stream, or the thread where there is none, wait until it is there."""


class Several:
    """Layers that are asked for as one."""

    def __init__(self, *layers: Layer) -> None:
        self._layers = layers

    def wait(self, stream: Any = None) -> None:
        for layer in self._layers:
            layer.wait(stream)


class LayerEvents:
    """The linker's `layer_done_counter`: the forward's stream waits for a layer, the CPU does not.

    Upstream's `LayerWiseLoadCounter` holds the thread that launches the forward until a layer has landed. An
    event may be waited for by a stream before it has happened, so here that thread runs ahead, as it does
    without loads. Without streams the forward is that thread's own work, and it waits.

    Args:
        waited: told of each batch how many seconds this thread waited for its layers; where there are streams it
            does not wait, and None is to be given.
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
        """`layers`: those of the pool; `first`: what is read before it is asked for."""
        self._layers[batch], self._first[batch] = layers, first
        self._seconds[batch] = 0.0

    def discard(self, batch: int) -> None:
        """The forward of `batch` was launched."""
        del self._layers[batch], self._first[batch]
        seconds = self._seconds.pop(batch)
        if self._waited is not None:
            self._waited(seconds)

    def set_consumer(self, index: int) -> None:
        """The forward that is launched next is that of batch `index`; -1: of one without loads."""
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
