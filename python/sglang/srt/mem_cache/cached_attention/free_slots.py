"""SGLang's list of free device slots, for `LoadFence`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from sglang.srt.mem_cache.allocator.base import BaseTokenToKVPoolAllocator
from sglang.srt.mem_cache.allocator.paged import PagedTokenToKVPoolAllocator
from sglang.srt.mem_cache.allocator.token import TokenToKVPoolAllocator

KNOWN = (PagedTokenToKVPoolAllocator, TokenToKVPoolAllocator)
"""Allocators that slice a tensor to take slots, and create a new one to free slots."""


class FreeSlots:
    """The present list. Holding it also holds its memory (8 bytes per page of the pool), so that no other list
    can have its address."""

    def __init__(self, allocator: BaseTokenToKVPoolAllocator) -> None:
        self._storage = allocator.free_pages.untyped_storage()

    def __eq__(self, other: object) -> bool:
        return isinstance(other, FreeSlots) and self._storage.data_ptr() == other._storage.data_ptr()


def free_slots(allocator: BaseTokenToKVPoolAllocator) -> Callable[[], Any]:
    """Makes the `free_list` of `LoadFence`. For unknown allocators its results are never equal, so loads wait."""
    if type(allocator) in KNOWN and not allocator.need_sort:
        return lambda: FreeSlots(allocator)
    return object
