"""Copies page records into the engine's paged KV pool and rotates their keys to another position on the way."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch

from cached_attention.kernels.compilation import CPU, cuda_target, load_library
from cached_attention.position.delta_table import NO_ROTATION, DeltaTables, rows_of
from cached_attention.position.rotation import Rotation, rotate

ELEMENTS = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}
"""Dtypes that the compiled code can rotate. Anything else is copied as 32-bit words."""

PAGES_AT_ONCE = 64
"""Pages per step of the torch version, so that intermediate results stay small."""

BLOCKS_VARIABLE = "CACHED_ATTENTION_BLOCKS"
DEFAULT_BLOCKS, MOST_BLOCKS = 32, 1024


def blocks_from(environment: Mapping[str, str]) -> int:
    """Number of thread blocks that the environment variable `CACHED_ATTENTION_BLOCKS` asks for.

    Raises:
        ValueError: not a whole number from 1 to `MOST_BLOCKS`.
    """
    text = environment.get(BLOCKS_VARIABLE, str(DEFAULT_BLOCKS))
    if not (text.isascii() and text.isdecimal() and 1 <= int(text) <= MOST_BLOCKS):
        raise ValueError(f"{BLOCKS_VARIABLE} is {text!r}: give a whole number from 1 to {MOST_BLOCKS}.")
    return int(text)


BLOCKS = blocks_from(os.environ)
"""CUDA thread blocks per call: enough reads in flight for a PCIe link, few enough to let the model run. The
variable is for experiments, and is read when this module is imported."""


class PagedComponent(NamedTuple):
    """One tensor of one layer's KV (K, V, or MLA's latent) on both sides."""

    pool: torch.Tensor
    """`[slots, heads, dim]` or `[slots, dim]`, owned by the engine; heads and slots may be strided."""
    records: torch.Tensor
    """`[records, page_size * heads * dim * itemsize]`, uint8: this component of each page record,
    `[token][head][dim]`. On the pool's device, or in host memory (pinned where the pool is on a GPU)."""
    rotation: Rotation | None = None
    """None: copied unchanged (V, and K of layers without positions)."""


class PageMoves(NamedTuple):
    """Which record goes to which page, and how far its keys are rotated; built once, used for every layer."""

    moves: torch.Tensor
    """`[3, n]`, int32, on the pool's device: page of the pool, record, row of `table`."""
    table: torch.Tensor
    """`[deltas, width]`, fp32, on the pool's device."""


class RopeOnLoad:
    """Copies page records into the pool in one pass: keys are rotated, everything else is copied.

    Uses compiled code if a library has been built or can be compiled, otherwise torch, with bit-identical
    results. Calls may be made from any thread; the compiled code runs without the GIL. On CUDA, `moves` and
    `load` run on the current stream, which must be the same for both, and return before the copies have finished.

    Args:
        layers: components of each layer.
        page_size: tokens per page; page p starts at slot `p * page_size`.
        compiled: False to use torch only.
        blocks: CUDA thread blocks per call.

    Raises:
        ValueError: a shape, stride, dtype or kind of memory is not supported.
    """

    def __init__(
        self,
        layers: Sequence[Sequence[PagedComponent]],
        page_size: int,
        *,
        compiled: bool = True,
        blocks: int = BLOCKS,
    ) -> None:
        self._blocks = blocks
        self._layers = [[_in_heads(component) for component in layer] for layer in layers]
        self._page_size = page_size
        self._device = self._layers[0][0].pool.device
        flat = [component for layer in self._layers for component in layer]
        self._tables = DeltaTables(c.rotation for c in flat if c.rotation is not None)
        self._element = _element_of(flat)
        self._rows = torch.tensor([self._describe(component) for component in flat], dtype=torch.int64)
        counts = torch.tensor([0, *(len(layer) for layer in self._layers)])
        self._first_row = counts.cumsum(0).tolist()
        self._num_pages = min(component.pool.shape[0] for component in flat) // page_size
        self._num_records = min(component.records.shape[0] for component in flat)
        self._library = load_library(self._target()) if compiled else None

    @property
    def is_compiled(self) -> bool:
        return self._library is not None

    def _target(self) -> str:
        if self._device.type == "cuda":
            return cuda_target(torch.cuda.get_device_capability(self._device))
        return CPU

    def moves(
        self, pages: Sequence[int] | torch.Tensor, records: Sequence[int], deltas: Sequence[int]
    ) -> PageMoves:
        """Moves of `records[i]` to pool page `pages[i]`, keys rotated by `deltas[i]` tokens (0: verbatim copy).

        Args:
            pages: values of a tensor on a GPU (`[n]`, integer) are not checked, so nothing waits for them.

        Raises:
            ValueError: a page or record does not exist, or the lists differ in length.
        """
        if not len(pages) == len(records) == len(deltas):
            raise ValueError(f"{len(pages)} pages, {len(records)} records and {len(deltas)} deltas do not match.")
        self._check("record", records, self._num_records)
        rows, distinct = rows_of(deltas)
        table = self._to_device(self._tables.build(distinct))
        if isinstance(pages, torch.Tensor) and pages.is_cuda:
            others = self._to_device(torch.tensor([records, rows], dtype=torch.int32))
            return PageMoves(torch.cat((pages.to(torch.int32).reshape(1, -1), others)), table)
        numbers = pages.tolist() if isinstance(pages, torch.Tensor) else pages
        self._check("page", numbers, self._num_pages)
        return PageMoves(self._to_device(torch.tensor([numbers, records, rows], dtype=torch.int32)), table)

    @staticmethod
    def _check(name: str, given: Sequence[int], limit: int) -> None:
        if given and not 0 <= min(given) <= max(given) < limit:
            raise ValueError(f"There are {limit} {name}s; got {name} {min(given)} to {max(given)}.")

    def _to_device(self, tensor: torch.Tensor) -> torch.Tensor:
        if self._device.type == "cpu":
            return tensor
        return tensor.pin_memory().to(self._device, non_blocking=True)

    def load(self, layers: range, moves: PageMoves) -> None:
        """Perform the moves for the adjacent `layers`: one in a layer-by-layer load, or several at once."""
        if self._library is None:
            for layer in layers:
                for component in self._layers[layer]:
                    self._load_in_torch(component, moves)
            return
        rows = self._rows[self._first_row[layers.start] : self._first_row[layers.stop]]
        self._library.rope_on_load(*moves, rows, self._page_size, self._element, self._blocks)

    def _load_in_torch(self, component: PagedComponent, moves: PageMoves) -> None:
        pool, records, rotation = component
        offsets = torch.arange(self._page_size, device=pool.device)
        for pages, sources, rows in zip(*(row.long().split(PAGES_AT_ONCE) for row in moves.moves), strict=True):
            data = records[sources.to(records.device)].to(pool.device).view(pool.dtype)
            data = data.view(-1, self._page_size, *pool.shape[1:])
            turned = (rows != NO_ROTATION).nonzero().flatten()
            if rotation is not None and len(turned):
                first = self._tables.first_column(rotation)
                table = moves.table[rows[turned], first : first + rotation.rotary_dim]
                data[turned] = rotate(data[turned], table.unsqueeze(1), rotation)
            pool[(pages.unsqueeze(1) * self._page_size + offsets).flatten()] = data.flatten(0, 1)

    def _describe(self, component: PagedComponent) -> list[int]:
        """The fields of `Component` in `csrc/rope_on_load.cuh`."""
        pool, records, rotation = component
        heads, dim = pool.shape[1:]
        bytes_per_page = self._page_size * heads * dim * pool.itemsize
        if records.shape[1] != bytes_per_page or records.stride(0) % pool.itemsize:
            raise ValueError(
                f"A page of shape {(self._page_size, heads, dim)} and {pool.dtype} takes {bytes_per_page} bytes; "
                f"its record has {records.shape[1]}, {records.stride(0)} bytes from one to the next."
            )
        if rotation is not None and rotation.stop > dim:
            raise ValueError(f"Elements up to {rotation.stop} are to be rotated; a head has {dim}.")
        sides = [pool.data_ptr(), pool.stride(0), pool.stride(1), heads, dim]
        sides += [records.data_ptr(), records.stride(0) // pool.itemsize]
        if rotation is None:
            return [*sides, 0, 0, 0, 0]
        return [*sides, *rotation.geometry(), self._tables.first_column(rotation)]


def _in_heads(component: PagedComponent) -> PagedComponent:
    """Validate a component; its pool gets three dimensions, and 32-bit words if its dtype cannot be rotated."""
    pool, records, rotation = component
    if pool.ndim == 2:
        pool = pool.unsqueeze(1)
    if pool.ndim != 3 or pool.stride(2) != 1:
        raise ValueError(
            f"A pool is [slots, heads, dim] with adjacent elements; got shape {tuple(pool.shape)} and "
            f"strides {pool.stride()}."
        )
    if records.ndim != 2 or records.dtype != torch.uint8 or records.stride(1) != 1:
        raise ValueError(
            f"Records are uint8 of shape [records, bytes]; got {records.dtype} {tuple(records.shape)}."
        )
    if pool.is_cuda and not (records.is_cuda or records.is_pinned()):
        raise ValueError("Records in host memory must be pinned: the GPU reads them.")
    if pool.dtype not in ELEMENTS:
        if rotation is not None:
            raise ValueError(
                f"Keys of {pool.dtype} cannot be rotated; of {', '.join(map(str, ELEMENTS))} they can."
            )
        pool = pool.view(torch.float32)
    return PagedComponent(pool, records, rotation)


def _element_of(components: Sequence[PagedComponent]) -> int:
    dtypes = {component.pool.dtype for component in components}
    if len(dtypes) != 1:
        raise ValueError(f"The components of a pool have one dtype; got {sorted(map(str, dtypes))}.")
    return ELEMENTS[dtypes.pop()]
