"""Gives SGLang attention that runs on the simulated GPU: the backend `torch_native` is that of the plain CPU."""

from __future__ import annotations

import sys
from typing import Any

import sglang_cached_attention  # noqa: F401
import torch


def activate() -> None:
    """Entry point; it is loaded in every process of SGLang."""
    from sglang.srt.layers.attention.attention_registry import register_attention_backend
    from sglang.srt.mem_cache import memory_pool
    from sglang.srt.platforms.plain_cpu import linear_attention, registration

    gated_norm = linear_attention.gated_norm

    def gated_norm_of_rows(norm: Any, x: torch.Tensor, z: torch.Tensor, **rest: Any) -> torch.Tensor:
        return gated_norm(norm, x, z.reshape(x.shape), **rest)

    linear_attention.gated_norm = gated_norm_of_rows
    registration.register_backend()
    # Otherwise it compiles a kernel, where there is a compiler.
    memory_pool.can_use_store_cache = lambda *_: False
    for name in ("torch_native", "triton"):  # Only with the second does SGLang use CUDA graphs.
        register_attention_backend(name)(_create_backend)


def _create_backend(model_runner: Any) -> Any:
    from sglang.srt.models.deepseek_common.attention_backend_handler import AttentionBackendRegistry
    from sglang.srt.platforms.plain_cpu import NAME, registration

    from benchmark.simulated_gpu.attention import RecordableAttnBackend

    registration.use_latent_attention()
    backend = RecordableAttnBackend(model_runner)
    if model_runner.use_mla_backend:
        AttentionBackendRegistry.register("torch_native", AttentionBackendRegistry.get_handler(NAME))
    if (model := sys.modules.get("sglang.srt.models.qwen3_5")) is not None:
        # Otherwise a kernel takes the projections apart.
        setattr(model, "_gdn_decode_fused_proj_conv", False)  # noqa: B010
    return backend
