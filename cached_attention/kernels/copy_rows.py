"""Copies many rows between byte arrays at once, with the GPU's cores or its copy engines."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

Pair = tuple[torch.Tensor, torch.Tensor]
"""Target and source: `[rows, bytes]`, uint8, a row's bytes adjacent. On the GPU, or in pinned host memory."""

NO_STREAM = -1
"""Both sides are in host memory."""


class RowCopies:
    """Compiled copies between pairs of arrays; one call copies the same rows of every pair.

    On GPU tensors, `by_cores` uses the current stream and `by_engines` the given one. Neither waits or allocates
    device memory.

    Args:
        library: from `compilation.load_library`; the one for a GPU also runs on a CPU.

    Raises:
        ValueError: the two sides of a pair differ in row size, or the bytes of a row are not adjacent.
    """

    def __init__(self, pairs: Sequence[Pair], library: Any) -> None:
        self._library = library
        self._arrays = torch.tensor([_describe(*pair) for pair in pairs], dtype=torch.int64)

    def by_cores(self, of: slice, target_rows: torch.Tensor, source_rows: torch.Tensor, blocks: int) -> None:
        """Copy with a kernel that reads and writes 16 bytes at a time where everything is aligned to that.

        Args:
            of: the pairs to copy.
            target_rows, source_rows: `[rows]`, int32, on the GPU. Not checked.
            blocks: number of blocks of 256 threads; each thread has 128 bytes in flight.
        """
        self._library.copy_rows(self._arrays[of], target_rows, source_rows, blocks)

    def by_engines(self, of: slice, target_rows: torch.Tensor, source_rows: torch.Tensor, stream: int) -> None:
        """One copy per pair and row, handed to the driver in a single call from CUDA 13 on.

        Args:
            of: the pairs to copy.
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
