"""Memory layout of the KV of one page: `[layer][component][token][...]`, the same in every tier."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

import torch

ALIGNMENT = 4096
"""Bytes; records start on a boundary that O_DIRECT, huge pages and RDMA accept."""


@dataclass(frozen=True)
class PageLayout:
    """Sizes of a page record on one rank.

    A component is what one layer keeps per token in one tensor: K and V for MHA and GQA, the
    compressed latent for MLA.
    """

    page_size: int
    """Tokens per page."""
    component_bytes: tuple[tuple[int, ...], ...]
    """Per layer, per component: bytes of one page."""

    @property
    def num_layers(self) -> int:
        return len(self.component_bytes)

    @property
    def page_bytes(self) -> int:
        """Bytes of a record without padding."""
        return sum(map(sum, self.component_bytes))

    @property
    def stride(self) -> int:
        """Bytes from one record to the next."""
        return -(-self.page_bytes // ALIGNMENT) * ALIGNMENT

    def offsets(self) -> list[tuple[int, ...]]:
        """Per layer, per component: byte offset in the record."""
        flat = [size for layer in self.component_bytes for size in layer]
        starts = iter([0, *accumulate(flat)])
        return [tuple(next(starts) for _ in layer) for layer in self.component_bytes]


class DevicePool:
    """The engine's paged KV pool, seen as bytes: per layer and component a `[pages, bytes]` view.

    Args:
        layers: per layer the component tensors, each `[slots, ...]`, contiguous, slots of a page
            adjacent and aligned. No copy is made: the tensors are the engine's own.
        page_size: tokens per page.
        slots: slots that can be used, where an engine has reserved addresses for more; by default all.

    Raises:
        ValueError: a tensor is not contiguous.
    """

    def __init__(
        self, layers: Sequence[Sequence[torch.Tensor]], page_size: int, slots: int | None = None
    ) -> None:
        self.buffers = [list(layer) for layer in layers]
        """The tensors as given."""
        self.layers = [[_pages_of(buffer, page_size) for buffer in layer] for layer in layers]
        self.device = self.layers[0][0].device
        pages = [buffer.shape[0] for layer in self.layers for buffer in layer]
        self.num_pages = min(pages if slots is None else [*pages, slots // page_size])
        self.layout = PageLayout(
            page_size, tuple(tuple(buffer.shape[1] for buffer in layer) for layer in self.layers)
        )


def _pages_of(buffer: torch.Tensor, page_size: int) -> torch.Tensor:
    if not buffer.is_contiguous():
        raise ValueError(
            f"a KV buffer of shape {tuple(buffer.shape)} and strides {buffer.stride()} is not contiguous: "
            "its pages cannot be moved as whole records."
        )
    pages = buffer.shape[0] // page_size
    return buffer[: pages * page_size].view(torch.uint8).reshape(pages, -1)
