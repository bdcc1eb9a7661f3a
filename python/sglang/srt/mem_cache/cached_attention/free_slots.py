"""SGLang's list of free device slots, as `LoadFence` looks at it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from sglang.srt.mem_cache.allocator.base import BaseTokenToKVPoolAllocator
from sglang.srt.mem_cache.allocator.paged import PagedTokenToKVPoolAllocator
from sglang.srt.mem_cache.allocator.token import TokenToKVPoolAllocator

KNOWN = (PagedTokenToKVPoolAllocator, TokenToKVPoolAllocator)
"""To take slots they slice a tensor, and to free some they make a new one."""


class FreeSlots:
    """The list as it is now. Kept, it keeps its memory (8 bytes per page of the pool), so that no other
    can be at its address."""

    def __init__(self, allocator: BaseTokenToKVPoolAllocator) -> None:
        self._storage = allocator.free_pages.untyped_storage()

    def __eq__(self, other: object) -> bool:
        return isinstance(other, FreeSlots) and self._storage.data_ptr() == other._storage.data_ptr()


def free_slots(allocator: BaseTokenToKVPoolAllocator) -> Callable[[], Any]:
    """For `LoadFence`. The list of an allocator that is not known is never the same, so that loads wait."""
    if type(allocator) in KNOWN and not allocator.need_sort:
        return lambda: FreeSlots(allocator)
    return object
