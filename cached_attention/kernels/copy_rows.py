"""Rows of byte arrays to rows of others, many at once: by the GPU's cores, or by its copy engines."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

Pair = tuple[torch.Tensor, torch.Tensor]
"""Target and source: `[rows, bytes]`, uint8, a row's bytes adjacent. On the GPU, or in pinned host memory."""

NO_STREAM = -1
"""Both sides lie in memory of the host."""


class RowCopies:
    """Compiled copies between pairs of arrays; those of one call take the same rows of each.

    Calls on tensors of the GPU go to the current stream, wait for nothing and allocate nothing.

    Args:
        library: see `compilation.load_library`; the one for a GPU also runs on a CPU.

    Raises:
        ValueError: the two sides of a pair have rows of unequal size, or bytes that are not adjacent.
    """

    def __init__(self, pairs: Sequence[Pair], library: Any) -> None:
        self._library = library
        self._arrays = torch.tensor([_describe(*pair) for pair in pairs], dtype=torch.int64)

    def by_cores(self, of: slice, target_rows: torch.Tensor, source_rows: torch.Tensor, blocks: int) -> None:
        """One kernel that reads and writes 16 bytes at once, wherever they lie.

        Args:
            of: the pairs that take part.
            target_rows, source_rows: `[rows]`, int32, on the GPU. Not checked.
            blocks: of 256 threads, each with 128 bytes in flight.
        """
        self._library.copy_rows(self._arrays[of], target_rows, source_rows, blocks)

    def by_engines(self, of: slice, target_rows: torch.Tensor, source_rows: torch.Tensor, stream: int) -> None:
        """One copy per pair and row, handed to the driver in one call.

        Args:
            of: the pairs that take part.
            target_rows, source_rows: `[rows]`, int32, in host memory. Not checked.
            stream: handle of a CUDA stream, or `NO_STREAM`.
        """
        self._library.copy_rows_batched(self._arrays[of], target_rows, source_rows, stream)


def _describe(target: torch.Tensor, source: torch.Tensor) -> list[int]:
    """The fields of `Arrays` in `csrc/copy_rows.cu`."""
    for side in (target, source):
        if side.ndim != 2 or side.dtype != torch.uint8 or side.stride(1) != 1:
            raise ValueError(f"Rows are uint8 of shape [rows, bytes]; got {side.dtype} {tuple(side.shape)}.")
    if target.shape[1] != source.shape[1]:
        raise ValueError(f"A row of {source.shape[1]} bytes does not fit one of {target.shape[1]}.")
    sides = (target.data_ptr(), target.stride(0), source.data_ptr(), source.stride(0))
    return [*sides, target.shape[1]]
