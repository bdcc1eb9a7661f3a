"""Which pools of SGLang the store takes, and what it says of the others."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from sglang.srt.mem_cache.cached_attention.pools import UnsupportedModelError, device_pool
from sglang.srt.mem_cache.memory_pool import MHATokenToKVPool, MHATokenToKVPoolFP4, MLATokenToKVPool
from sglang.srt.mem_cache.unified_cache.component_type import ComponentType

PAGE = 16
FULL = {ComponentType.FULL}


def params(pool: Any, **extra: Any) -> Any:
    allocator = SimpleNamespace(get_kvcache=lambda: pool)
    drafts = {"mtp_draft_device_pools": (), "sidecar_draft_device_pools": ()}
    return SimpleNamespace(token_to_kv_pool_allocator=allocator, page_size=PAGE, **{**drafts, **extra})


def mha() -> MHATokenToKVPool:
    return MHATokenToKVPool(
        size=8 * PAGE,
        page_size=PAGE,
        dtype=torch.bfloat16,
        head_num=2,
        head_dim=32,
        layer_num=3,
        device="cpu",
        enable_memory_saver=False,
    )


def test_grouped_query_attention_has_keys_and_values() -> None:
    pool = mha()
    device = device_pool(params(pool), FULL)
    assert device.layout.component_bytes == ((PAGE * 2 * 32 * 2,) * 2,) * 3
    assert device.num_pages == pool.k_buffer[0].shape[0] // PAGE
    pool.v_buffer[1][5 * PAGE : 6 * PAGE] = 7
    assert device.layers[1][1][5].view(torch.bfloat16).eq(7).all()
    assert not device.layers[1][0][5].view(torch.bfloat16).eq(7).any()


def test_latent_attention_has_one_component() -> None:
    pool = MLATokenToKVPool(
        size=8 * PAGE,
        page_size=PAGE,
        dtype=torch.bfloat16,
        kv_lora_rank=64,
        qk_rope_head_dim=16,
        layer_num=2,
        device="cpu",
        enable_memory_saver=False,
    )
    assert device_pool(params(pool), FULL).layout.component_bytes == ((PAGE * 80 * 2,),) * 2


def test_other_state_beside_attention_is_refused() -> None:
    with pytest.raises(UnsupportedModelError, match=r"because it has SWA state.*without the flag"):
        device_pool(params(mha()), {ComponentType.FULL, ComponentType.SWA})
    with pytest.raises(UnsupportedModelError, match="because it has MAMBA state"):
        device_pool(params(mha()), {ComponentType.FULL, ComponentType.MAMBA})


def test_a_draft_model_is_refused() -> None:
    with pytest.raises(UnsupportedModelError, match="draft model"):
        device_pool(params(mha(), sidecar_draft_device_pools=(object(),)), FULL)


@pytest.mark.parametrize("kind", [MHATokenToKVPoolFP4, SimpleNamespace])
def test_another_pool_is_refused_by_name(kind: type) -> None:
    pool = kind.__new__(kind)
    with pytest.raises(UnsupportedModelError, match=kind.__name__):
        device_pool(params(pool), FULL)


def test_another_layout_is_refused() -> None:
    pool = mha()
    pool.kv_cache_layout = "hnd"
    with pytest.raises(UnsupportedModelError, match="'hnd' instead of 'nhd'"):
        device_pool(params(pool), FULL)
    pool = mha()
    pool.k_scale_buffer = [torch.ones(1)]
    with pytest.raises(UnsupportedModelError, match="quantised"):
        device_pool(params(pool), FULL)
