"""SGLang's allocators: whether slots became free, told from their lists alone."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from sglang.srt.mem_cache.allocator.paged import PagedTokenToKVPoolAllocator
from sglang.srt.mem_cache.allocator.token import TokenToKVPoolAllocator
from sglang.srt.mem_cache.cached_attention.free_slots import free_slots

PAGE = 4
SLOTS = 64


def paged(**options: Any) -> PagedTokenToKVPoolAllocator:
    return PagedTokenToKVPoolAllocator(SLOTS, PAGE, torch.float32, "cpu", None, **options)


def by_token(**options: Any) -> TokenToKVPoolAllocator:
    return TokenToKVPoolAllocator(SLOTS, torch.float32, "cpu", None, **options)


@pytest.mark.parametrize("make", [paged, by_token])
def test_taking_slots_changes_nothing_and_freeing_some_does(make: Any) -> None:
    allocator = make(need_sort=False)
    now = free_slots(allocator)
    before = now()
    first, second = allocator.alloc(2 * PAGE), allocator.alloc(PAGE)
    assert now() == before
    allocator.free_group_begin()
    allocator.free(first)
    assert now() == before
    allocator.free_group_end()
    after = now()
    assert after != before
    allocator.alloc(PAGE)
    assert now() == after
    allocator.free(second)
    assert now() not in (before, after)
    allocator.clear()
    assert now() not in (before, after)


@pytest.mark.parametrize("make", [paged, by_token])
def test_the_last_slot_may_be_taken(make: Any) -> None:
    allocator = make(need_sort=False)
    now = free_slots(allocator)
    before = now()
    everything = allocator.alloc(SLOTS)
    assert now() == before
    allocator.free(everything)
    assert now() != before


def test_of_an_allocator_that_is_not_known_loads_wait() -> None:
    class Another(PagedTokenToKVPoolAllocator): ...

    for allocator in (
        paged(need_sort=True),
        Another(SLOTS, PAGE, torch.float32, "cpu", None, need_sort=False),
    ):
        now = free_slots(allocator)
        assert now() != now()
