"""What a worker process must know before it builds a model runner."""

import os
from typing import Any

import torch
from sglang.srt.platforms.plain_cpu import NAME
from sglang.srt.plugins.hook_registry import HookRegistry, HookType

BOOTSTRAP = "sglang.srt.distributed.bootstrap"
ALLOCATION = "sglang.srt.mem_cache.allocation"


def register_in_worker() -> None:
    """Add the attention backend, and replace two functions that upstream keys by backend or CPU name."""
    from sglang.srt.layers.attention.attention_registry import ATTENTION_BACKENDS, register_attention_backend

    if NAME in ATTENTION_BACKENDS:
        return
    register_attention_backend(NAME)(_create_backend)
    # Upstream takes the torch version for "torch_native" only, and a Triton kernel for any other name.
    HookRegistry.register(f"{ALLOCATION}.get_last_loc", last_slots, HookType.REPLACE)
    # Upstream binds threads with an op of its AMX build, which it takes for granted on ARM.
    HookRegistry.register(f"{BOOTSTRAP}._init_cpu_threads_env", bind_rank, HookType.REPLACE)
    HookRegistry.apply_hooks()


def _create_backend(model_runner: Any) -> Any:
    from sglang.srt.platforms.plain_cpu.attention import PlainCpuAttnBackend

    return PlainCpuAttnBackend(model_runner)


def last_slots(
    req_to_token: torch.Tensor, req_pool_indices: torch.Tensor, prefix_lens: torch.Tensor
) -> torch.Tensor:
    """Slot of each request's last prefix token, -1 where it has no prefix. All [requests] but the table."""
    last = req_to_token[req_pool_indices, (prefix_lens - 1).clamp_min(0)].to(prefix_lens.dtype)
    return torch.where(prefix_lens > 0, last, -1)


def bind_rank(*, local_omp_cpuid: str | None, dist_init_method: str | None = None) -> None:
    """Keep this rank on its CPUs, a list like "0-3,8", where ranks were given CPUs at all."""
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
