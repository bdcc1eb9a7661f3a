"""What a worker process must register before it builds a model runner."""

import os
from collections.abc import Callable
from inspect import signature, unwrap
from typing import Any

import torch
from sglang.srt.platforms.plain_cpu import NAME
from sglang.srt.plugins.hook_registry import HookRegistry, HookType

SRT = "sglang.srt"


def register_hooks() -> None:
    """Replace functions in which upstream decides by the name of a backend or CPU. Once per process."""
    # Upstream uses the torch version for "torch_native" only, and a Triton kernel for any other name.
    HookRegistry.register(f"{SRT}.mem_cache.allocation.get_last_loc", last_slots, HookType.REPLACE)
    # Upstream binds threads with an op of its AMX build, which it assumes to exist on ARM.
    HookRegistry.register(f"{SRT}.distributed.bootstrap._init_cpu_threads_env", bind_rank, HookType.REPLACE)
    # On the device "cpu" upstream knows one kind of scaled RoPE, for latent-attention models.
    HookRegistry.register(f"{SRT}.layers.rotary_embedding.factory.get_rope_cpu", any_rope, HookType.AROUND)


def register_backend() -> None:
    """Add the attention backend to upstream's registry."""
    from sglang.srt.layers.attention.attention_registry import register_attention_backend

    register_attention_backend(NAME)(_create_backend)
    # Upstream's linear attention uses Triton.
    setup = f"{SRT}.model_executor.model_runner_components.attention_backend_setup"
    HookRegistry.register(f"{setup}.attn_backend_wrapper", linear_attention_too, HookType.AROUND)
    allow_dp_attention()


def allow_dp_attention() -> None:
    """Let DP attention do without pinned memory, Triton and ops for accelerators, as in upstream's AMX build."""
    from sglang.srt.distributed import parallel_state
    from sglang.srt.layers import dp_attention
    from sglang.srt.model_executor import forward_batch_info

    # Nothing else in these modules depends on it.
    parallel_state._is_cpu = forward_batch_info._is_cpu = True
    dp_attention.memcpy_func = dp_attention.memcpy_cpu


def _create_backend(model_runner: Any) -> Any:
    from sglang.srt.platforms.plain_cpu.attention import PlainCpuAttnBackend

    if model_runner.use_mla_backend:
        use_latent_attention()
    return PlainCpuAttnBackend(model_runner)


def linear_attention_too(original: Callable[..., Any], model_runner: Any, attention: Any) -> Any:
    """`attention`, and the backend that the other layers of a hybrid model need."""
    from sglang.srt.configs.hybrid_arch import hybrid_gdn_config

    config = hybrid_gdn_config(model_runner.model_config)
    if config is None:
        return original(model_runner, attention)
    from sglang.srt.platforms.plain_cpu.linear_attention import hybrid_backend

    return hybrid_backend(model_runner, attention, config.full_attention_layer_ids)


def use_latent_attention() -> None:
    """Make DeepSeek-like models attend to the latent KV cache in every forward.

    By default they expand the keys of a prefill themselves, for backends that take keys from the caller.
    """
    from sglang.srt.models.deepseek_common.attention_backend_handler import AttentionBackendRegistry
    from sglang.srt.models.deepseek_common.attention_forward_methods.forward_methods import AttnForwardMethod

    AttentionBackendRegistry.register(NAME, lambda attention, forward_batch: AttnForwardMethod.MLA)


def any_rope(original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """The rotary embedding of other devices, where upstream's CPU version would refuse."""
    from sglang.srt.layers.rotary_embedding.factory import get_rope, get_rope_cpu

    call = signature(unwrap(get_rope_cpu)).bind(*args, **kwargs).arguments
    if (call.get("rope_scaling") or {}).get("rope_type") == "deepseek_yarn":
        return original(*args, **kwargs)
    call.pop("device", None)
    return get_rope(**call)


def last_slots(
    req_to_token: torch.Tensor, req_pool_indices: torch.Tensor, prefix_lens: torch.Tensor
) -> torch.Tensor:
    """Slot of each request's last prefix token, -1 if it has no prefix. All [requests] except the table."""
    last = req_to_token[req_pool_indices, (prefix_lens - 1).clamp_min(0)].to(prefix_lens.dtype)
    return torch.where(prefix_lens > 0, last, -1)


def bind_rank(*, local_omp_cpuid: str | None, dist_init_method: str | None = None) -> None:
    """Bind this rank to its CPUs, a list like "0-3,8", if ranks were assigned CPUs at all."""
    if local_omp_cpuid is None or not os.environ.get("SGLANG_CPU_OMP_THREADS_BIND"):
        return
    cpus = parse_cpu_list(local_omp_cpuid)
    os.sched_setaffinity(0, cpus)
    torch.set_num_threads(len(cpus))


def parse_cpu_list(text: str) -> set[int]:
    """CPU numbers of a list like "0-3,8".

    Raises:
        ValueError: `text` is not such a list.
    """
    cpus: set[int] = set()
    for part in text.split(","):
        first, _, last = part.partition("-")
        try:
            cpus.update(range(int(first), int(last or first) + 1))
        except ValueError:
            raise ValueError(
                f"Not a CPU list: {text!r}. Give numbers and ranges, such as 0-3,8, in "
                "SGLANG_CPU_OMP_THREADS_BIND, one list per rank, separated by '|'."
            ) from None
    return cpus
