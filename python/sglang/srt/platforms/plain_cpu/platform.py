"""The platform class: defaults that let SGLang's PyPI wheel serve on a CPU."""

import logging
import os
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any

import torch
from sglang.srt.arg_groups.choices import ATTENTION_BACKEND_CHOICES, add_attention_backend_choices
from sglang.srt.platforms.cpu import CpuDeviceMixin
from sglang.srt.platforms.interface import PlatformCapabilities, PlatformEnum, SRTPlatform
from sglang.srt.platforms.plain_cpu import NAME
from sglang.srt.platforms.plain_cpu.registration import register_backend, register_hooks
from sglang.srt.platforms.plain_cpu.speculation import ALGORITHMS, draft_chains, slots_of_chain
from sglang.srt.platforms.plain_cpu.speculation import register_hooks as register_speculation
from sglang.srt.plugins.hook_registry import HookRegistry

logger = logging.getLogger(__name__)

# KV pool and weights take this share of the free memory, over all ranks: the pool is in the machine's memory,
# together with the host tier, the tokenizer and everything else.
STATIC_MEMORY_FRACTION = 0.6
# Upstream zeroes the whole pool at start: without a limit a small model would take that share of the machine, and
# half a minute, for millions of slots that no CPU can fill.
MAX_TOTAL_TOKENS = 262_144
MAX_RUNNING_REQUESTS = 256


class PlainCpuPlatform(CpuDeviceMixin, SRTPlatform):
    """Any CPU that torch runs on, without `sgl_kernel`'s AMX build."""

    _enum = PlatformEnum.OOT
    capabilities = PlatformCapabilities()

    def __init__(self) -> None:
        super().__init__()
        if NAME not in ATTENTION_BACKEND_CHOICES:
            add_attention_backend_choices([NAME])
            register_hooks()

    def get_device(self, device_id: int = 0) -> str:
        # Upstream compares with the string "cpu" (threads, memory, RoPE): a torch.device would not match.
        return "cpu"

    def get_default_attention_backend(self) -> str:
        return NAME

    def support_mamba_cache_extra_buffer(self) -> bool:
        return True

    def supports_speculative_algorithm(self, algorithm: str) -> bool:
        return algorithm in ALGORITHMS

    def get_speculative_cache_locs_fn(self) -> Callable[..., torch.Tensor]:
        return slots_of_chain

    def get_torch_profiler_activity_str(self) -> str:
        return "CPU"

    def get_torch_profiler_activity(self) -> torch.profiler.ProfilerActivity:
        return torch.profiler.ProfilerActivity.CPU

    def apply_server_args_defaults(self, server_args: Any) -> None:
        """Fill in what the user left open: attention and sampling backend, memory share, no graphs."""
        from sglang.srt.model_executor.cuda_graph_config import Backend, Phase, with_phase

        if server_args.attention_backend in (None, "intel_amx"):
            # intel_amx is upstream's default for --device cpu; its kernels are not in the PyPI wheel.
            server_args.attention_backend = self.get_default_attention_backend()
        if server_args.sampling_backend is None:
            server_args.sampling_backend = "pytorch"
        # With DP attention the replicas are among the tensor-parallel ranks.
        replicas = 1 if server_args.enable_dp_attention else server_args.dp_size
        ranks = server_args.tp_size * server_args.pp_size * replicas
        if server_args.mem_fraction_static is None:
            server_args.mem_fraction_static = round(STATIC_MEMORY_FRACTION / ranks, 3)
            if server_args.max_total_tokens is None:
                server_args.max_total_tokens = MAX_TOTAL_TOKENS
        if server_args.max_running_requests is None:
            server_args.max_running_requests = MAX_RUNNING_REQUESTS
        if server_args.dtype == "float32":
            # Upstream would round convolution states to bfloat16.
            os.environ.setdefault("SGLANG_MAMBA_CONV_DTYPE", "float32")
        graphs = with_phase(server_args.cuda_graph_config, Phase.DECODE, backend=Backend.DISABLED)
        server_args.cuda_graph_config = with_phase(graphs, Phase.PREFILL, backend=Backend.DISABLED)
        draft_chains(server_args)
        prepare_threads(ranks)

    def get_compile_backend(self, mode: str | None = None) -> str:
        # Inductor would need a C++ compiler on the serving machine, and half a minute of the first request.
        return "eager"

    def init_backend(self) -> None:
        # Rotating stored keys by a delta needs cos/sin in full precision, as upstream keeps them on CUDA.
        os.environ.setdefault("SGLANG_ROPE_CACHE_FP32", "1")
        register_backend()
        register_speculation()
        HookRegistry.apply_hooks()

    def post_load_model(self, model: torch.nn.Module) -> None:
        logger.info("No accelerator found: serving on the CPU with %d threads", torch.get_num_threads())


def prepare_threads(ranks: int) -> None:
    """Set what the worker processes read from the environment before their first parallel loop.

    Idle OpenMP threads sleep: if they spin, the default, a rank that shares its cores with the tokenizer, the
    detokenizer or anything else decodes ten times slower. With several ranks each gets its own CPUs, through the
    variable by which upstream binds ranks; without it upstream allows no more ranks than there are NUMA nodes.
    """
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    if ranks > 1:
        groups = split_cpus(sorted(os.sched_getaffinity(0)), ranks)
        os.environ.setdefault("SGLANG_CPU_OMP_THREADS_BIND", "|".join(",".join(map(str, g)) for g in groups))


def split_cpus(cpus: Sequence[int], ranks: int) -> list[list[int]]:
    """Split `cpus` among `ranks` into contiguous, nearly equal parts; if there are too few, ranks share CPUs."""
    if len(cpus) < ranks:
        return [[cpus[rank % len(cpus)]] for rank in range(ranks)]
    bounds = [len(cpus) * rank // ranks for rank in range(ranks + 1)]
    return [list(cpus[start:stop]) for start, stop in pairwise(bounds)]
