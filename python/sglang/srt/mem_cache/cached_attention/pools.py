"""SGLang's KV pools as a device pool of the store."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, NoReturn

import torch
from sglang.srt.mem_cache.cache_init_params import CacheInitParams
from sglang.srt.mem_cache.memory_pool import (
    DSATokenToKVPool,
    HybridLinearKVPool,
    HybridReqToTokenPool,
    MambaPool,
    MHATokenToKVPool,
    MLATokenToKVPool,
)
from sglang.srt.mem_cache.swa_memory_pool import SWAKVPool
from sglang.srt.mem_cache.unified_cache.component_type import ComponentType

from cached_attention.layout import DevicePool

KEEP_WINDOWS = "Add --disable-hybrid-swa-memory, and they keep all tokens"
"""Remedy if layers with sliding windows keep no other tokens."""

Layers = list[list[torch.Tensor]]
"""Per layer: the tensors `[slots, ...]` with what it keeps for each token."""


class UnsupportedModelError(ValueError):
    """This model's KV cannot be kept in the hierarchy; the server must run without the flag."""


def draft_pools(params: CacheInitParams) -> Sequence[Any]:
    """The KV pools of draft models, which have the same slots as the target model's."""
    return [*params.mtp_draft_device_pools, *params.sidecar_draft_device_pools]


def device_pool(params: CacheInitParams, components: set[ComponentType]) -> DevicePool:
    """The KV of the layers with MHA, GQA, MLA or DeepSeek's sparse attention, and of draft models.

    Raises:
        UnsupportedModelError: another kind of pool; the message names it.
    """
    if others := components - {ComponentType.FULL, ComponentType.MAMBA, ComponentType.SWA}:
        names = sorted(component.name for component in others)
        refuse(f"it has {' and '.join(names)} state besides full attention")
    if components >= {ComponentType.SWA, ComponentType.MAMBA}:
        refuse("it has sliding windows and states", KEEP_WINDOWS)
    if params.mtp_draft_mamba_pools:
        refuse("its draft model has states as well", "Leave --speculative-algorithm out")
    pool = _of_full_attention(params.token_to_kv_pool_allocator.get_kvcache())
    layers = _layers(pool)
    drafts = [layer for pool in draft_pools(params) for layer in _layers(pool)]
    _let_ride(layers, drafts)
    return _pool(layers, params.page_size, pool.size)


def is_replicated(params: CacheInitParams) -> bool:
    """Whether every rank that shares an attention layer keeps all of its KV: latents, which have no heads."""
    pools = [_of_full_attention(params.token_to_kv_pool_allocator.get_kvcache()), *draft_pools(params)]
    return all(isinstance(_of_attention(pool), MLATokenToKVPool) for pool in pools)


def state_pool(params: CacheInitParams) -> DevicePool:
    """The states of the layers with linear attention or Mamba. A page is one slot: the states of all of them.

    Raises:
        UnsupportedModelError: SGLang keeps them in another way, or keeps more than states; the message says so.
    """
    slots = params.req_to_token_pool
    if type(slots) is not HybridReqToTokenPool or type(slots.mamba_pool) is not MambaPool:
        refuse(f"its states lie in a {type(slots.mamba_pool).__name__} of a {type(slots).__name__}")
    if slots.mamba_ckpt_pool is not None:
        refuse("its states are quantised", "Leave --enable-int8-mamba-checkpoint out")
    if slots.mamba_pool._slot_siblings:
        refuse("its layers keep more than the states of linear attention")
    if not params.enable_mamba_extra_buffer:
        refuse(
            "SGLang keeps its states at the end of a request only",
            "Give --mamba-radix-cache-strategy extra_buffer and --linear-attn-backend triton, or start the "
            "server without the flag where SGLang has none for this model",
        )
    kept = slots.mamba_pool.mamba_cache
    parts = [part for part in (*kept.conv, kept.temporal) if part.numel()]
    return _pool([[part[layer] for part in parts] for layer in range(len(parts[0]))], page_size=1)


def window_pool(params: CacheInitParams) -> DevicePool:
    """The KV of the layers for which SGLang keeps only a sliding window.

    Raises:
        UnsupportedModelError: SGLang keeps it in another way; the message says so.
    """
    pool = params.token_to_kv_pool_allocator.get_kvcache()
    if type(pool) is not SWAKVPool or not params.swa_gates_prefix_match:
        refuse(f"its sliding windows lie in a {type(pool).__name__} of each request", KEEP_WINDOWS)
    return _pool(_layers(pool.swa_kv_pool), params.page_size, pool.swa_kv_pool.size)


def _of_full_attention(pool: Any) -> Any:
    """The part of the pool with all tokens: in models with sliding windows, that of the full-attention layers."""
    if type(pool) is not SWAKVPool:
        return pool
    if not pool.full_layer_nums:
        refuse("all of its layers keep a sliding window only", KEEP_WINDOWS)
    if isinstance(pool.full_kv_pool, DSATokenToKVPool):
        # SGLang reads the data of its indexer without waiting for the layer.
        refuse("it has sparse attention beside sliding windows")
    return pool.full_kv_pool


def _pool(layers: Layers, page_size: int, size: int | None = None) -> DevicePool:
    """`size`: tokens that SGLang allocates, besides the page that it never does; it may have reserved more."""
    try:
        return DevicePool(layers, page_size, None if size is None else size + page_size)
    except ValueError as error:
        refuse(str(error))


def _let_ride(layers: Layers, drafts: Layers) -> None:
    """Add layers of draft models to the last of `layers`: they are read only after the target model has run."""
    for place, draft in enumerate(drafts, start=len(layers) - len(drafts)):
        layers[max(0, place)] += draft


def _of_attention(pool: Any) -> Any:
    """The part of the pool with KV, in models whose other layers keep states."""
    return pool.full_kv_pool if type(pool) is HybridLinearKVPool else pool


def _layers(pool: Any) -> Layers:
    pool = _of_attention(pool)
    # Exactly these classes: a subclass may keep more, or use another layout.
    layers_of = {
        MHATokenToKVPool: _mha_layers,
        MLATokenToKVPool: _latent_layers,
        DSATokenToKVPool: _sparse_layers,
    }
    if type(pool) not in layers_of:
        refuse(f"its KV lies in a {type(pool).__name__}")
    return layers_of[type(pool)](pool)


def _latent_layers(pool: MLATokenToKVPool) -> Layers:
    return [[buffer] for buffer in pool.kv_buffer]


def _mha_layers(pool: MHATokenToKVPool) -> Layers:
    scales = (pool.k_scale_buffer, getattr(pool, "native_k_scale_buffer", None))
    if any(scale is not None for scale in scales):
        refuse("its KV is quantised with scales beside it")
    if pool.kv_cache_layout != "nhd":
        refuse(f"its KV has the layout {pool.kv_cache_layout!r} instead of 'nhd'")
    return [[k, v] for k, v in zip(pool.k_buffer, pool.v_buffer, strict=True)]


def _sparse_layers(pool: DSATokenToKVPool) -> Layers:
    """Latents, and the indexer's data for each token; layers that take another layer's selection have none."""
    if pool.index_kpool != 1 or pool.index_page_size != pool.page_size:
        refuse("its indexer keeps several tokens in one, or a page in parts")
    return [
        [latents, *_slots(index, pool.page_size)]
        for latents, index in zip(pool.kv_buffer, pool.index_k_with_scale_buffer, strict=True)
    ]


def _slots(pages: torch.Tensor, page_size: int) -> Iterable[torch.Tensor]:
    """`[pages, bytes]` as `[slots, bytes / page_size]`; empty if there are no pages."""
    return [pages.view(len(pages) * page_size, -1)] if len(pages) else []


def refuse(reason: str, remedy: str = "Start the server without the flag") -> NoReturn:
    """Raise the error for a model that cannot be served with the flag, or with another flag next to it."""
    raise UnsupportedModelError(
        "--enable-cached-attention supports models with plain MHA, GQA or MLA attention, or DeepSeek's sparse "
        "one, and beside it sliding windows, linear attention or Mamba; this one is not supported because "
        f"{reason}. {remedy}."
    )
