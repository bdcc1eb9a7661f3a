"""SGLang's KV pools as a device pool of the store."""

from __future__ import annotations

from typing import Any, NoReturn

from sglang.srt.mem_cache.cache_init_params import CacheInitParams
from sglang.srt.mem_cache.memory_pool import MHATokenToKVPool, MLATokenToKVPool
from sglang.srt.mem_cache.unified_cache.component_type import ComponentType

from cached_attention.layout import DevicePool


class UnsupportedModelError(ValueError):
    """This model's KV cannot be kept in the hierarchy; the server must run without the flag."""


def device_pool(params: CacheInitParams, components: set[ComponentType]) -> DevicePool:
    """The pool of a model with plain MHA, GQA or MLA attention.

    Raises:
        UnsupportedModelError: another kind of pool; the message names it.
    """
    pool = params.token_to_kv_pool_allocator.get_kvcache()
    if components != {ComponentType.FULL}:
        others = sorted(component.name for component in components - {ComponentType.FULL})
        _refuse(f"it has {' and '.join(others)} state besides full attention")
    if params.mtp_draft_device_pools or params.sidecar_draft_device_pools:
        _refuse("it has a draft model with KV of its own")
    if type(pool) is MLATokenToKVPool:
        layers = [[buffer] for buffer in pool.kv_buffer]
    elif type(pool) is MHATokenToKVPool:
        layers = _mha_layers(pool)
    else:
        _refuse(f"its KV lies in a {type(pool).__name__}")
    try:
        return DevicePool(layers, params.page_size)
    except ValueError as error:
        _refuse(str(error))


def _mha_layers(pool: MHATokenToKVPool) -> list[list[Any]]:
    scales = (pool.k_scale_buffer, getattr(pool, "native_k_scale_buffer", None))
    if any(scale is not None for scale in scales):
        _refuse("its KV is quantised with scales beside it")
    if pool.kv_cache_layout != "nhd":
        _refuse(f"its KV has the layout {pool.kv_cache_layout!r} instead of 'nhd'")
    return [[k, v] for k, v in zip(pool.k_buffer, pool.v_buffer, strict=True)]


def _refuse(reason: str) -> NoReturn:
    raise UnsupportedModelError(
        f"--enable-cached-attention supports models with plain MHA, GQA or MLA attention; this one is not "
        f"supported because {reason}. Start the server without the flag."
    )
