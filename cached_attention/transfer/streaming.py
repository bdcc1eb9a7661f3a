"""Copies many rows at the speed of one large memcpy, by writing around the CPU's caches.

A memcpy of a few kilobytes writes through the caches, which reads each line from memory before it is written:
half the speed of what libc does for copies larger than the caches. Rows of pages are small, but many.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from llvmlite import ir
from numba import njit, types
from numba.extending import intrinsic

LINE = 64
"""Bytes moved at once."""
_BYTE = ir.IntType(8)
_LINE = ir.VectorType(_BYTE, LINE)
_MEMORY_PAGE = 4096
_BLOCK = 4 * _MEMORY_PAGE
"""Bytes copied as four streams, one per memory page, so that more of memory's banks are busy at once."""


@intrinsic
def _stream_line(_context: Any, target: Any, source: Any) -> Any:
    """Move a line between two addresses; `target` is aligned to `LINE`."""

    def generate(_context: Any, builder: Any, _signature: Any, addresses: Any) -> None:
        target, source = (builder.inttoptr(address, _LINE.as_pointer()) for address in addresses)
        store = builder.store(builder.load(source, align=1), target, align=LINE)
        mark = builder.module.add_metadata([ir.Constant(ir.IntType(32), 1)])
        store.set_metadata("nontemporal", mark)

    return types.void(types.intp, types.intp), generate


@intrinsic
def _move_byte(_context: Any, target: Any, source: Any) -> Any:
    def generate(_context: Any, builder: Any, _signature: Any, addresses: Any) -> None:
        target, source = (builder.inttoptr(address, _BYTE.as_pointer()) for address in addresses)
        builder.store(builder.load(source), target)

    return types.void(types.intp, types.intp), generate


@intrinsic
def _fence(_context: Any) -> Any:
    """Order streamed lines with what other threads see; without it they are not."""

    def generate(_context: Any, builder: Any, _signature: Any, _arguments: Any) -> None:
        builder.fence("seq_cst")

    return types.void(), generate


@njit("void(intp, intp, intp)", nogil=True)
def _stream(target: int, source: int, size: int) -> None:
    start = min(-target % LINE, size)
    for byte in range(start):
        _move_byte(target + byte, source + byte)
    blocks = start + (size - start) // _BLOCK * _BLOCK
    for block in range(start, blocks, _BLOCK):
        for place in range(block, block + _MEMORY_PAGE, 2 * LINE):
            for line in range(place, place + _BLOCK, _MEMORY_PAGE):
                _stream_line(target + line, source + line)
                _stream_line(target + line + LINE, source + line + LINE)
    lines = blocks + (size - blocks) // LINE * LINE
    for line in range(blocks, lines, LINE):
        _stream_line(target + line, source + line)
    for byte in range(lines, size):
        _move_byte(target + byte, source + byte)


@njit("void(intp[:, ::1], intp[::1], intp[:, ::1], intp[::1], intp[::1])", nogil=True)
def copy_rows(
    target: np.ndarray, target_rows: np.ndarray, source: np.ndarray, source_rows: np.ndarray, sizes: np.ndarray
) -> None:
    """Copy rows `source_rows` of each source array to rows `target_rows` of the corresponding target array.

    Checks nothing and runs without the GIL. All arguments are `intp`.

    Args:
        target, source: `[arrays, 2]`: address of row 0, and stride in bytes.
        target_rows, source_rows: `[rows]`.
        sizes: `[arrays]`: bytes of a row.
    """
    for row in range(len(target_rows)):
        for array in range(len(sizes)):
            _stream(
                target[array, 0] + target_rows[row] * target[array, 1],
                source[array, 0] + source_rows[row] * source[array, 1],
                sizes[array],
            )
    _fence()
