"""What SGLang's tree tells `LoadFence`: locks, evictions, and that a forward was launched."""

from __future__ import annotations

from array import array
from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from sglang.srt.mem_cache.allocator.paged import PagedTokenToKVPoolAllocator
from sglang.srt.mem_cache.base_prefix_cache import EvictParams, InsertParams, MatchPrefixParams
from sglang.srt.mem_cache.cache_init_params import CacheInitParams
from sglang.srt.mem_cache.cached_attention import plugin
from sglang.srt.mem_cache.cached_attention.free_slots import free_slots
from sglang.srt.mem_cache.cached_attention.radix_cache import CachedAttentionRadixCache
from sglang.srt.mem_cache.radix_cache import RadixKey
from sglang.srt.mem_cache.unified_cache.component_type import ComponentType

from cached_attention.transfer.cpu_stream import CpuEvent
from cached_attention.transfer.load_fence import LoadFence

PAGE = 4
SLOTS = 64


class Tree:
    """A tree with one prompt in it, after two launches, the last of a forward that has the prompt locked."""

    def __init__(self) -> None:
        self.allocator = PagedTokenToKVPoolAllocator(SLOTS, PAGE, torch.float32, "cpu", None, need_sort=False)
        params = CacheInitParams(
            False,
            None,
            self.allocator,
            PAGE,
            tree_components=(ComponentType.FULL,),  # type: ignore[arg-type]
        )
        self.fence = LoadFence(free_slots(self.allocator))
        self.cache: Any = CachedAttentionRadixCache(params)
        linker = SimpleNamespace(fence=self.fence, forward_launched=lambda: self.fence.launched([CpuEvent()]))
        self.cache.linker = SimpleNamespace(
            cache_linker=linker,
            finish_loads=list,
            inserting=lambda key: nullcontext(),
            inserted=lambda params, result: None,
        )
        self.prompt = RadixKey(array("q", range(8 * PAGE)))
        self.insert(self.prompt)
        self.node = self.cache.match_prefix(MatchPrefixParams(key=self.prompt)).last_device_node
        self.held = self.cache.lock(self.node)
        for _ in range(2):
            self.launch()

    def insert(self, prompt: RadixKey) -> None:
        self.cache.insert(InsertParams(key=prompt, value=self.allocator.alloc(len(prompt))))

    def launch(self) -> None:
        assert self.cache.finish_external_linker_loads([]) == []


@pytest.fixture
def tree() -> Tree:
    return Tree()


def test_a_request_that_lets_go_of_its_prompt_closes_the_fence(tree: Tree) -> None:
    assert not tree.fence.is_closed
    tree.cache.unlock(tree.held)
    assert tree.fence.is_closed
    tree.launch()
    assert not tree.fence.is_closed


def test_a_look_at_a_prompt_while_it_is_scheduled_does_not(tree: Tree) -> None:
    tree.cache.unlock(tree.cache.lock(tree.node))
    assert not tree.fence.is_closed


@pytest.mark.parametrize("evict", ["evict", "evict_for_alloc"])
def test_what_is_evicted_was_held_by_nobody_unless_somebody_let_go(tree: Tree, evict: str) -> None:
    everything = EvictParams(num_tokens=SLOTS)
    before = tree.allocator.available_size()
    getattr(tree.cache, evict)(everything)
    assert tree.allocator.available_size() == before
    tree.cache.unlock(tree.held)
    tree.launch()
    getattr(tree.cache, evict)(everything)
    assert tree.allocator.available_size() == SLOTS
    assert not tree.fence.is_closed


def test_what_is_put_into_the_tree_closes_it(tree: Tree) -> None:
    tree.insert(RadixKey(array("q", range(100, 100 + PAGE))))
    assert tree.fence.is_closed


def test_slots_that_are_freed_otherwise_close_it(tree: Tree) -> None:
    own = tree.allocator.alloc(PAGE)
    assert not tree.fence.is_closed
    tree.allocator.free(own)
    assert tree.fence.is_closed


def test_nobody_is_preempted_for_a_request_that_waits_for_its_pages(tree: Tree) -> None:
    ready = {"late": False, "here": True}
    tree.cache._keep_waiting = set()
    tree.cache.linker.ranks = SimpleNamespace(is_ready=ready.__getitem__)
    adder, preempted = SimpleNamespace(tree_cache=tree.cache), []

    def preempt(_adder: Any, req: Any) -> bool:
        preempted.append(req.cache_request_handle.rid)
        return True

    late, here = (SimpleNamespace(cache_request_handle=SimpleNamespace(rid=rid)) for rid in ready)
    # SGLang ends the pass at the first request for which it gets False.
    assert plugin._preempt(preempt, adder, late)  # type: ignore[arg-type]
    assert plugin._preempt(preempt, adder, here)  # type: ignore[arg-type]
    assert preempted == ["here"]
    ready["late"] = True
    assert not tree.cache.check_prefetch_progress(late.cache_request_handle), (
        "there is no room for it in this pass"
    )
    tree.cache._keep_waiting.clear()
    assert tree.cache.check_prefetch_progress(late.cache_request_handle)


def test_other_trees_are_served_as_by_sglang() -> None:
    other: Any = SimpleNamespace(tree_cache=None)
    assert plugin._preempt(lambda adder, req: "answer", other, other) == "answer"  # type: ignore[arg-type, return-value, comparison-overlap]
    assert plugin._announce(lambda scheduler, req, ticket: ticket, other, other, "ticket") == "ticket"
