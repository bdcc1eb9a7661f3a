"""SGLang's KV pools as a device pool of the store."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, NoReturn

import torch
from sglang.srt.mem_cache.cache_init_params import CacheInitParams
from sglang.srt.mem_cache.memory_pool import DSATokenToKVPool, MHATokenToKVPool, MLATokenToKVPool
from sglang.srt.mem_cache.unified_cache.component_type import ComponentType

from cached_attention.layout import DevicePool

KEEP_WINDOWS = "--disable-hybrid-swa-memory"

Layers = list[list[torch.Tensor]]
"""Per layer the tensors `[slots, ...]` that hold what it keeps of each token."""


class UnsupportedModelError(ValueError):
    """This model's KV cannot be kept in the hierarchy; the server must run without the flag."""


def draft_pools(params: CacheInitParams) -> Sequence[Any]:
    """The KV pools of draft models, which have the same slots as the target model's."""
    return [*params.mtp_draft_device_pools, *params.sidecar_draft_device_pools]


def device_pool(params: CacheInitParams, components: set[ComponentType]) -> DevicePool:
    """The pool of a model with plain MHA, GQA, MLA or DeepSeek's sparse attention, and of its draft models.

    Raises:
        UnsupportedModelError: another kind of pool; the message names it.
    """
    if components == {ComponentType.FULL, ComponentType.SWA}:
        _refuse("some of its layers keep a sliding window only", f"Add {KEEP_WINDOWS}, and they keep all")
    if components != {ComponentType.FULL}:
        others = sorted(component.name for component in components - {ComponentType.FULL})
        _refuse(f"it has {' and '.join(others)} state besides full attention")
    layers = _layers(params.token_to_kv_pool_allocator.get_kvcache())
    drafts = [layer for pool in draft_pools(params) for layer in _layers(pool)]
    _let_ride(layers, drafts)
    try:
        return DevicePool(layers, params.page_size)
    except ValueError as error:
        _refuse(str(error))


def _let_ride(layers: Layers, drafts: Layers) -> None:
    """Add those of draft models to the last of `layers`: nobody reads them before the target model has run."""
    if len(drafts) > len(layers):
        _refuse(f"its draft model has {len(drafts)} layers, and it has {len(layers)} itself")
    for layer, draft in zip(reversed(layers), reversed(drafts), strict=False):
        layer += draft


def _layers(pool: Any) -> Layers:
    # Exactly these: a subclass may keep more, or lay it out in another way.
    layers_of = {
        MHATokenToKVPool: _mha_layers,
        MLATokenToKVPool: _latent_layers,
        DSATokenToKVPool: _sparse_layers,
    }
    if type(pool) not in layers_of:
        _refuse(f"its KV lies in a {type(pool).__name__}")
    return layers_of[type(pool)](pool)


def _latent_layers(pool: MLATokenToKVPool) -> Layers:
    return [[buffer] for buffer in pool.kv_buffer]


def _mha_layers(pool: MHATokenToKVPool) -> Layers:
    scales = (pool.k_scale_buffer, getattr(pool, "native_k_scale_buffer", None))
    if any(scale is not None for scale in scales):
        _refuse("its KV is quantised with scales beside it")
    if pool.kv_cache_layout != "nhd":
        _refuse(f"its KV has the layout {pool.kv_cache_layout!r} instead of 'nhd'")
    return [[k, v] for k, v in zip(pool.k_buffer, pool.v_buffer, strict=True)]


def _sparse_layers(pool: DSATokenToKVPool) -> Layers:
    """Latents, and what the indexer knows of each token; layers that take over another's choice have none."""
    if pool.index_kpool != 1 or pool.index_page_size != pool.page_size:
        _refuse("its indexer keeps several tokens in one, or a page in parts")
    return [
        [latents, *_slots(index, pool.page_size)]
        for latents, index in zip(pool.kv_buffer, pool.index_k_with_scale_buffer, strict=True)
    ]


def _slots(pages: torch.Tensor, page_size: int) -> Iterable[torch.Tensor]:
    """`[pages, bytes]` as `[slots, bytes / page_size]`; none where there are no pages."""
    return [pages.view(len(pages) * page_size, -1)] if len(pages) else []


def _refuse(reason: str, remedy: str = "Start the server without the flag") -> NoReturn:
    raise UnsupportedModelError(
        "--enable-cached-attention supports models with plain MHA, GQA or MLA attention, or DeepSeek's sparse "
        f"one; this one is not supported because {reason}. {remedy}."
    )
