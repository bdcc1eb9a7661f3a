"""Which linker a hybrid model gets, what it goes together with, and which pool each of its layers reads."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
from sglang.srt.mem_cache.cached_attention.hybrid import HybridLinker, HybridTreeLink, _sources
from sglang.srt.mem_cache.cached_attention.linker import CachedAttentionLinker
from sglang.srt.mem_cache.cached_attention.mla_dedup import MlaDedupLinker
from sglang.srt.mem_cache.cached_attention.pools import UnsupportedModelError
from sglang.srt.mem_cache.hicache_storage import PoolName
from sglang.srt.mem_cache.unified_cache.component_type import ComponentType

FULL = {ComponentType.FULL}
HYBRID = {ComponentType.FULL, ComponentType.MAMBA}


def test_the_model_decides_on_the_linker() -> None:
    for kind in (CachedAttentionLinker, HybridLinker):
        assert type(kind.__new__(CachedAttentionLinker, components=HYBRID)) is HybridLinker
    assert type(CachedAttentionLinker.__new__(CachedAttentionLinker, components=FULL)) is CachedAttentionLinker
    assert type(MlaDedupLinker.__new__(MlaDedupLinker, components=HYBRID)) is MlaDedupLinker


def test_states_are_not_broadcast() -> None:
    nothing: Any = None
    with pytest.raises(UnsupportedModelError, match=r"not broadcast\. Leave --cached-attention-mla-dedup out"):
        MlaDedupLinker(nothing, nothing, components=HYBRID)


def test_states_are_not_shared_by_servers(monkeypatch: pytest.MonkeyPatch) -> None:
    def configure(linker: Any, *_args: Any, **_options: Any) -> None:
        linker._config = SimpleNamespace(remote="mooncake://127.0.0.1:1")

    monkeypatch.setattr(CachedAttentionLinker, "__init__", configure)
    nothing: Any = None
    with pytest.raises(UnsupportedModelError, match=r"shared by servers\. Leave --cached-attention-remote out"):
        HybridLinker(nothing, nothing, components=HYBRID)


def test_each_layer_waits_for_its_own_pool() -> None:
    kv, states = PoolName.KV, PoolName.MAMBA
    assert _sources({1: 0, 4: 1}, {0: 0, 2: 1, 3: 2, 5: 3}, 0) == [
        (states, 0),
        (kv, 0),
        (states, 1),
        (states, 2),
        (kv, 1),
        (states, 3),
    ]


class Tree:
    """A tree whose node 7 has a state, and what the link saves of it."""

    def __init__(self) -> None:
        self.locked: list[int] = []
        self.offloaded: list[list[Any]] = []
        self.link: Any = HybridTreeLink.__new__(HybridTreeLink)
        self.link._with_state = set()
        self.link.pending_offloads = []
        self.link.cache = SimpleNamespace(
            tree_core=SimpleNamespace(get_component_device_value=lambda node, kind: f"slot of {node}"),
            get_last_hash_value=lambda node: f"hash of {node}",
            inc_lock_ref=self.lock,
        )
        self.link.cache_linker = SimpleNamespace(offload=self.offloaded.append)

    def lock(self, node: int) -> Any:
        self.locked.append(node)
        return SimpleNamespace(to_dec_params=lambda: "lock")

    def insert(self, state: Any = "slot", exists: bool = False) -> None:
        self.link.inserted(
            SimpleNamespace(mamba_value=state), SimpleNamespace(mamba_exist=exists, last_device_node=7)
        )


def test_a_state_that_comes_after_the_pages_of_its_node_is_saved_by_itself() -> None:
    tree = Tree()
    tree.insert()
    ((state,),) = tree.offloaded
    assert (state.name, state.device_indices, state.keys) == (PoolName.MAMBA, "slot of 7", ["hash of 7"])
    assert tree.link.pending_offloads == [(7, "lock", [])]
    assert tree.locked == [7]


def test_a_state_that_was_saved_with_its_pages_or_is_not_new_is_not_saved_again() -> None:
    tree = Tree()
    tree.insert(exists=True)
    tree.insert(state=None)
    tree.link._with_state.add(7)
    tree.insert()
    assert tree.offloaded == []
    tree.insert()
    assert len(tree.offloaded) == 1
