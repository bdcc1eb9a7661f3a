"""What SGLang's KV pools ask before they hand out a layer."""

from __future__ import annotations

from collections.abc import Sequence

from cached_attention.transfer.streams import Event


class LayerEvents:
    """The linker's `layer_done_counter`: the forward's stream waits for a layer, the CPU does not.

    Upstream's `LayerWiseLoadCounter` holds the thread that launches the forward until a layer has landed. An
    event may be waited for by a stream before it has happened, so here that thread runs ahead, as it does
    without loads. Without streams the forward is that thread's own work, and it waits.
    """

    def __init__(self, num_layers: int) -> None:
        self.num_layers = num_layers
        self.reset()

    def reset(self) -> None:
        self.consumer_index = -1
        self._last = -1
        self._layers: dict[int, Sequence[Event]] = {}

    def next_batch(self) -> int:
        self._last += 1
        return self._last

    def add(self, batch: int, layers: Sequence[Event]) -> None:
        """`layers`: one event per layer of the pool."""
        self._layers[batch] = layers

    def discard(self, batch: int) -> None:
        """The forward of `batch` was launched."""
        del self._layers[batch]

    def set_consumer(self, index: int) -> None:
        """The forward that is launched next is that of batch `index`; -1: of one without loads."""
        self.consumer_index = index

    def wait_until(self, threshold: int) -> None:
        """The current stream is about to read layer `threshold`."""
        if (layers := self._layers.get(self.consumer_index)) is not None:
            layers[threshold].wait()
