"""Which pools of SGLang the store takes, and what it says of the others."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from sglang.srt import runtime_context
from sglang.srt.configs.mamba_utils import Mamba2CacheParams, Mamba2StateDType, Mamba2StateShape
from sglang.srt.mem_cache import kv_cache_configurator
from sglang.srt.mem_cache.cached_attention import flags, plugin
from sglang.srt.mem_cache.cached_attention.pools import (
    UnsupportedModelError,
    device_pool,
    is_replicated,
    state_pool,
    window_pool,
)
from sglang.srt.mem_cache.memory_pool import (
    DSATokenToKVPool,
    HybridLinearKVPool,
    HybridReqToTokenPool,
    MHATokenToKVPool,
    MHATokenToKVPoolFP4,
    MLATokenToKVPool,
)
from sglang.srt.mem_cache.swa_memory_pool import SWAKVPool
from sglang.srt.mem_cache.unified_cache.component_type import ComponentType
from sglang.srt.runtime_context import get_parallel

PAGE = 16
FULL = {ComponentType.FULL}


def params(pool: Any, page_size: int = PAGE, **extra: Any) -> Any:
    allocator = SimpleNamespace(get_kvcache=lambda: pool)
    drafts = dict.fromkeys(("mtp_draft_device_pools", "mtp_draft_mamba_pools", "sidecar_draft_device_pools"), ())
    others = {**drafts, "swa_gates_prefix_match": True, **extra}
    return SimpleNamespace(token_to_kv_pool_allocator=allocator, page_size=page_size, **others)


def mha(layers: int = 3, heads: int = 2, dtype: torch.dtype = torch.bfloat16) -> MHATokenToKVPool:
    return MHATokenToKVPool(
        size=8 * PAGE,
        page_size=PAGE,
        dtype=dtype,
        head_num=heads,
        head_dim=32,
        layer_num=layers,
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


def test_slots_for_which_there_are_only_addresses_do_not_count() -> None:
    """SGLang reserves them before it captures CUDA graphs, and knows how many it can use only afterwards."""
    pool = mha()
    pool.size = 5 * PAGE
    device = device_pool(params(pool), FULL)
    assert device.num_pages == 6
    assert len(device.layers[0][0]) == 9


def mla(layers: int = 2) -> MLATokenToKVPool:
    return MLATokenToKVPool(
        size=8 * PAGE,
        page_size=PAGE,
        dtype=torch.bfloat16,
        kv_lora_rank=64,
        qk_rope_head_dim=16,
        layer_num=layers,
        device="cpu",
        enable_memory_saver=False,
    )


def test_latent_attention_has_one_component() -> None:
    assert device_pool(params(mla()), FULL).layout.component_bytes == ((PAGE * 80 * 2,),) * 2


def sparse(**how: Any) -> DSATokenToKVPool:
    with get_parallel().override(attn_dcp_size=1):
        return DSATokenToKVPool(
            size=8 * 64,
            page_size=64,
            kv_lora_rank=64,
            dtype=torch.bfloat16,
            qk_rope_head_dim=16,
            layer_num=3,
            device="cpu",
            index_head_dim=128,
            enable_memory_saver=False,
            kv_cache_dim=80,
            **how,
        )


def test_sparse_attention_has_what_its_indexer_knows() -> None:
    pool = sparse(skip_topk_layers=[False, True, False])
    device = device_pool(params(pool, 64), FULL)
    latents, index = 64 * 80 * 2, 64 * (128 + 4)
    assert device.layout.component_bytes == ((latents, index), (latents,), (latents, index))
    assert device.num_pages == len(pool.index_k_with_scale_buffer[0])
    pool.index_k_with_scale_buffer[2][5] = 7
    assert device.layers[2][1][5].eq(7).all()
    assert not device.layers[2][1][[4, 6]].eq(7).any()


OURS = {"linker_module_path": flags.LINKER[0]}


@pytest.mark.parametrize(
    ("config", "is_draft_worker", "spares"),
    [
        (OURS, False, True),
        (OURS, True, False),
        ({"linker_module_path": "another"}, False, False),
        (None, False, True),
    ],
)
def test_layers_without_an_indexer_of_their_own_need_no_memory_for_one(
    config: dict[str, Any] | None, is_draft_worker: bool, spares: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Upstream makes none for layers that take another one's selection, except with a linker."""
    memory = SimpleNamespace(
        enable_hisparse=False,
        enable_hierarchical_cache=False,
        enable_unified_cache_external_linker=config is not None,
        unified_cache_external_linker_config=config,
    )
    for module in (kv_cache_configurator, runtime_context):
        monkeypatch.setattr(module, "get_memory", lambda: memory)
    original = kv_cache_configurator._should_elide_dsa_index_k
    assert plugin._spare_indexers(original, is_draft_worker=is_draft_worker) == spares


def test_latents_are_alike_on_all_ranks() -> None:
    assert is_replicated(params(mla()))
    assert is_replicated(params(sparse(), 64))
    assert is_replicated(params(mla(), mtp_draft_device_pools=(mla(layers=1),)))
    assert not is_replicated(params(mha()))
    assert not is_replicated(params(mla(), mtp_draft_device_pools=(mha(layers=1),)))


def test_an_indexer_that_pools_tokens_is_refused() -> None:
    pool = sparse()
    pool.index_kpool = 4
    with pytest.raises(UnsupportedModelError, match="keeps several tokens in one"):
        device_pool(params(pool, 64), FULL)


def test_other_state_beside_attention_is_refused() -> None:
    both = {ComponentType.FULL, ComponentType.SWA, ComponentType.MAMBA}
    with pytest.raises(UnsupportedModelError, match=r"windows and states. Add --disable-hybrid-swa-memory"):
        device_pool(params(mha()), both)
    with pytest.raises(UnsupportedModelError, match=r"because it has C128 state.*without the flag"):
        device_pool(params(mha()), {ComponentType.FULL, ComponentType.C128})


HYBRID = {ComponentType.FULL, ComponentType.MAMBA}
STATES = 5


def slots_of_states(layers: list[int], conv: torch.dtype = torch.bfloat16) -> HybridReqToTokenPool:
    shape = Mamba2StateShape.create(
        tp_world_size=1,
        intermediate_size=64,
        n_groups=2,
        num_heads=4,
        head_dim=16,
        state_size=8,
        conv_kernel=4,
    )
    return HybridReqToTokenPool(
        size=4,
        mamba_size=STATES,
        mamba_spec_state_size=4,
        max_context_len=64,
        device="cpu",
        enable_memory_saver=False,
        cache_params=Mamba2CacheParams(
            shape=shape, layers=layers, dtype=Mamba2StateDType(conv=conv, temporal=torch.float32)
        ),
        mamba_layer_ids=layers,
        enable_mamba_extra_buffer=True,
    )


def attention_at(layers: list[int], states: Any = None) -> HybridLinearKVPool:
    return HybridLinearKVPool(
        size=8 * PAGE,
        page_size=PAGE,
        dtype=torch.bfloat16,
        head_num=2,
        head_dim=32,
        full_attention_layer_ids=layers,
        device="cpu",
        mamba_pool=states,
    )


def hybrid(**extra: Any) -> Any:
    """Layers 1 and 4 of six have attention."""
    slots = slots_of_states([0, 2, 3, 5])
    pool = attention_at([1, 4], slots.mamba_pool)
    return params(pool, req_to_token_pool=slots, **{"enable_mamba_extra_buffer": True, **extra})


def test_a_hybrid_model_has_pages_of_its_attention_and_states_of_the_other_layers() -> None:
    of_model = hybrid()
    device, states = device_pool(of_model, HYBRID), state_pool(of_model)
    assert device.layout.component_bytes == ((PAGE * 2 * 32 * 2,) * 2,) * 2
    conv, temporal = (64 + 2 * 2 * 8) * 3 * 2, 4 * 16 * 8 * 4
    assert states.layout.component_bytes == ((conv, temporal),) * 4
    assert (states.layout.page_size, states.num_pages) == (1, STATES + 1)
    of_model.req_to_token_pool.mamba2_layer_cache(3).temporal[2] = 7
    assert states.layers[2][1][2].view(torch.float32).eq(7).all()
    assert not states.layers[2][1][[1, 3]].any()
    assert not states.layers[1][1].any()


def test_a_draft_of_a_hybrid_model_may_have_attention_and_no_states() -> None:
    draft = attention_at([0])
    own = PAGE * 2 * 32 * 2
    device = device_pool(hybrid(mtp_draft_device_pools=(draft,)), HYBRID)
    assert device.layout.component_bytes == ((own,) * 2, (own,) * 4)
    with pytest.raises(UnsupportedModelError, match=r"draft model has states.*Leave --speculative-algorithm out"):
        device_pool(hybrid(mtp_draft_mamba_pools=(object(),)), HYBRID)


def test_states_that_are_kept_in_another_way_are_refused() -> None:
    of_model = hybrid(enable_mamba_extra_buffer=False)
    with pytest.raises(UnsupportedModelError, match=r"request only\. Give --mamba-radix-cache-strategy"):
        state_pool(of_model)
    of_model = hybrid()
    of_model.req_to_token_pool.mamba_pool.register_slot_state(object())
    with pytest.raises(UnsupportedModelError, match="more than the states of linear attention"):
        state_pool(of_model)
    of_model = hybrid()
    of_model.req_to_token_pool.mamba_ckpt_pool = object()
    with pytest.raises(UnsupportedModelError, match=r"quantised\. Leave --enable-int8-mamba-checkpoint out"):
        state_pool(of_model)
    of_model.req_to_token_pool = SimpleNamespace(mamba_pool=object())
    with pytest.raises(UnsupportedModelError, match="its states lie in a object of a SimpleNamespace"):
        state_pool(of_model)


WINDOWED = {ComponentType.FULL, ComponentType.SWA}


def windowed(full: list[int], swa: list[int]) -> SWAKVPool:
    return SWAKVPool(
        size=8 * PAGE,
        size_swa=4 * PAGE,
        page_size=PAGE,
        dtype=torch.bfloat16,
        head_num=2,
        head_dim=32,
        swa_attention_layer_ids=swa,
        full_attention_layer_ids=full,
        device="cpu",
    )


def test_a_model_with_windows_has_pages_of_full_attention_and_of_the_layers_with_windows() -> None:
    pool = windowed([1, 3], [0, 2, 4])
    device, windows = device_pool(params(pool), WINDOWED), window_pool(params(pool))
    own = (PAGE * 2 * 32 * 2,) * 2
    assert (device.layout.component_bytes, device.num_pages) == ((own,) * 2, 9)
    assert (windows.layout.component_bytes, windows.num_pages) == ((own,) * 3, 5)
    assert windows.layout.page_size == PAGE
    pool.get_key_buffer(2)[PAGE] = 7
    assert windows.layers[1][0][1, : 2 * 32 * 2].view(torch.bfloat16).eq(7).all()
    assert not any(layer[0].any() for layer in device.layers)


def test_a_draft_of_a_model_with_windows_may_have_none_itself() -> None:
    own = PAGE * 2 * 32 * 2
    target, draft = windowed([1], [0, 2]), mha(layers=1)
    device = device_pool(params(target, sidecar_draft_device_pools=(draft,)), WINDOWED)
    assert device.layout.component_bytes == ((own,) * 4,)
    with pytest.raises(UnsupportedModelError, match="its KV lies in a SWAKVPool"):
        device_pool(params(target, sidecar_draft_device_pools=(windowed([0], [1]),)), WINDOWED)


def test_windows_that_are_kept_in_another_way_are_refused() -> None:
    with pytest.raises(UnsupportedModelError, match=r"all of its layers .* Add --disable-hybrid-swa-memory"):
        device_pool(params(windowed([], [0, 1])), WINDOWED)
    with pytest.raises(UnsupportedModelError, match=r"a SWAKVPool of each request\. Add"):
        window_pool(params(windowed([1], [0]), swa_gates_prefix_match=False))
    with pytest.raises(UnsupportedModelError, match="windows lie in a SimpleNamespace"):
        window_pool(params(SimpleNamespace()))


def test_sparse_attention_beside_windows_is_refused() -> None:
    """SGLang does not wait for a load before it reads the indexer's data there."""
    pool = windowed([1], [0])
    pool.full_kv_pool = object.__new__(DSATokenToKVPool)
    with pytest.raises(UnsupportedModelError, match="sparse attention beside sliding windows"):
        device_pool(params(pool), WINDOWED)


def test_layers_of_draft_models_ride_on_the_last() -> None:
    """One per depth of multi-token prediction, or a whole model of its own, of another shape."""
    own = PAGE * 2 * 32 * 2
    packed = (mha(layers=1), mha(layers=1))
    device = device_pool(params(mha(), mtp_draft_device_pools=packed), FULL)
    assert device.layout.component_bytes == ((own,) * 2, (own,) * 4, (own,) * 4)
    assert device.buffers[2][2] is packed[1].k_buffer[0]
    beside = mha(layers=2, heads=1, dtype=torch.float32)
    device = device_pool(params(mla(), sidecar_draft_device_pools=(beside,)), FULL)
    latent = PAGE * 80 * 2
    assert device.layout.component_bytes == ((latent, own, own), (latent, own, own))


def test_a_draft_model_may_have_more_layers_than_the_model() -> None:
    own, draft = PAGE * 2 * 32 * 2, mha(layers=4)
    device = device_pool(params(mha(layers=2), sidecar_draft_device_pools=(draft,)), FULL)
    assert device.layout.component_bytes == ((own,) * 8, (own,) * 4)
    assert device.buffers[1][2] is draft.k_buffer[3]


def test_a_draft_model_of_an_unknown_kind_is_refused() -> None:
    with pytest.raises(UnsupportedModelError, match="lies in a object"):
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
