"""When the plain-CPU platform is taken, and what it decides for a server."""

import glob
import os
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from sglang.srt.arg_groups.choices import ATTENTION_BACKEND_CHOICES
from sglang.srt.layers.rotary_embedding import factory
from sglang.srt.model_executor.cuda_graph_config import Backend, CudaGraphConfig
from sglang.srt.platforms import plain_cpu
from sglang.srt.platforms.interface import SRTPlatform
from sglang.srt.platforms.plain_cpu import PLATFORM_CLASS, registration
from sglang.srt.platforms.plain_cpu.platform import PlainCpuPlatform, split_cpus


@pytest.fixture(autouse=True)
def bare_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "environ", {})
    see_device_files(monkeypatch)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.version, "hip", None)
    for module in (torch.cuda, torch.xpu, torch.backends.mps):
        monkeypatch.setattr(module, "is_available", lambda: False)


def see_device_files(monkeypatch: pytest.MonkeyPatch, *paths: str) -> None:
    import fnmatch

    monkeypatch.setattr(glob, "glob", lambda pattern: fnmatch.filter(paths, pattern))


def test_active_without_accelerator() -> None:
    assert plain_cpu.activate() == PLATFORM_CLASS


@pytest.mark.parametrize("node", ["/dev/nvidia0", "/dev/nvhost-ctrl-gpu", "/usr/lib/wsl/lib/libcuda.so.1"])
def test_an_nvidia_device_keeps_it_out_even_if_hidden(node: str, monkeypatch: pytest.MonkeyPatch) -> None:
    see_device_files(monkeypatch, node)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert plain_cpu.activate() is None


def test_control_nodes_without_a_gpu_do_not(monkeypatch: pytest.MonkeyPatch) -> None:
    see_device_files(
        monkeypatch, "/dev/nvidiactl", "/dev/nvidia-uvm", "/dev/kfd", "/dev/dri/renderD128", "/dev/dxg"
    )
    assert plain_cpu.activate() == PLATFORM_CLASS


def test_rocm_node_counts_for_a_rocm_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    see_device_files(monkeypatch, "/dev/kfd")
    monkeypatch.setattr(torch.version, "cuda", None)
    monkeypatch.setattr(torch.version, "hip", "7.0")
    assert plain_cpu.activate() is None


def test_an_npu_counts_with_its_torch_extension(monkeypatch: pytest.MonkeyPatch) -> None:
    see_device_files(monkeypatch, "/dev/davinci0")
    assert plain_cpu.activate() == PLATFORM_CLASS
    monkeypatch.setattr(torch, "npu", SimpleNamespace(), raising=False)
    assert plain_cpu.activate() is None


@pytest.mark.parametrize("module", [torch.cuda, torch.xpu, torch.backends.mps])
def test_what_torch_sees_keeps_it_out(module: object, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "is_available", lambda: True)
    assert plain_cpu.activate() is None
    monkeypatch.setenv("SGLANG_PLATFORM", "plain_cpu")
    assert plain_cpu.activate() is None


def test_asked_by_name_it_passes_over_a_hidden_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    see_device_files(monkeypatch, "/dev/nvidia0")
    monkeypatch.setenv("SGLANG_PLATFORM", "plain_cpu")
    assert plain_cpu.activate() == PLATFORM_CLASS


def test_other_choices_keep_it_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SGLANG_PLATFORM", "kunlun")
    assert plain_cpu.activate() is None
    monkeypatch.delenv("SGLANG_PLATFORM")
    monkeypatch.setenv("SGLANG_USE_CPU_ENGINE", "1")
    assert plain_cpu.activate() is None


def test_detection_does_not_initialise_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    see_device_files(monkeypatch, "/dev/nvidia0")

    def touched() -> bool:
        raise AssertionError("the device file was answer enough")

    monkeypatch.setattr(torch.cuda, "is_available", touched)
    assert plain_cpu.activate() is None


def server_args(**given: object) -> SimpleNamespace:
    unset = dict.fromkeys(
        (
            "attention_backend",
            "sampling_backend",
            "mem_fraction_static",
            "max_total_tokens",
            "max_running_requests",
            "speculative_algorithm",
            "speculative_eagle_topk",
        )
    )
    one = {"tp_size": 1, "pp_size": 1, "dp_size": 1, "enable_dp_attention": False, "dtype": "auto"}
    return SimpleNamespace(**{**unset, **one, "cuda_graph_config": CudaGraphConfig(), **given})


def test_the_class_is_a_platform() -> None:
    platform = PlainCpuPlatform()
    assert isinstance(platform, SRTPlatform)
    assert platform.is_out_of_tree()
    assert platform.get_device() == "cpu"
    assert platform.get_torch_distributed_backend_str() == "gloo"
    assert platform.get_default_attention_backend() == "plain_cpu"
    assert ATTENTION_BACKEND_CHOICES.count("plain_cpu") == 1


@pytest.mark.parametrize("resolved", [None, "intel_amx"])
def test_defaults_of_a_bare_command_line(resolved: str | None) -> None:
    args = server_args(attention_backend=resolved)
    PlainCpuPlatform().apply_server_args_defaults(args)
    assert args.attention_backend == "plain_cpu"
    assert args.sampling_backend == "pytorch"
    assert 0 < args.mem_fraction_static < 1
    assert args.max_total_tokens > 0
    assert args.cuda_graph_config.decode.backend == args.cuda_graph_config.prefill.backend == Backend.DISABLED


def test_a_model_in_full_precision_has_convolutions_in_full_precision(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SGLANG_MAMBA_CONV_DTYPE", raising=False)
    PlainCpuPlatform().apply_server_args_defaults(server_args(dtype="bfloat16"))
    assert "SGLANG_MAMBA_CONV_DTYPE" not in os.environ
    PlainCpuPlatform().apply_server_args_defaults(server_args(dtype="float32"))
    assert os.environ["SGLANG_MAMBA_CONV_DTYPE"] == "float32"
    monkeypatch.delenv("SGLANG_MAMBA_CONV_DTYPE")


def test_what_the_user_says_stands() -> None:
    said = {
        "attention_backend": "torch_native",
        "sampling_backend": "flashinfer",
        "mem_fraction_static": 0.9,
        "max_running_requests": 3,
    }
    args = server_args(**said)
    PlainCpuPlatform().apply_server_args_defaults(args)
    assert {name: getattr(args, name) for name in said} == said
    assert args.max_total_tokens is None


@pytest.mark.parametrize(
    "ranks",
    [{"tp_size": 2}, {"dp_size": 2}, {"tp_size": 2, "dp_size": 2, "enable_dp_attention": True}],
    ids=["tp", "dp", "dp attention"],
)
def test_ranks_share_memory_and_cpus(monkeypatch: pytest.MonkeyPatch, ranks: dict[str, Any]) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {0, 1, 2, 5})
    one, two = server_args(), server_args(**ranks)
    PlainCpuPlatform().apply_server_args_defaults(one)
    assert os.environ["OMP_WAIT_POLICY"] == "PASSIVE"
    assert "SGLANG_CPU_OMP_THREADS_BIND" not in os.environ
    PlainCpuPlatform().apply_server_args_defaults(two)
    assert two.mem_fraction_static == pytest.approx(one.mem_fraction_static / 2)
    assert os.environ["SGLANG_CPU_OMP_THREADS_BIND"] == "0,1|2,5"


@pytest.mark.parametrize(
    ("cpus", "ranks", "expected"),
    [([0, 1, 2, 3], 2, [[0, 1], [2, 3]]), ([4, 6, 8], 2, [[4], [6, 8]]), ([7, 9], 3, [[7], [9], [7]])],
)
def test_split_cpus(cpus: list[int], ranks: int, expected: list[list[int]]) -> None:
    assert split_cpus(cpus, ranks) == expected


def test_a_rank_takes_its_cpus(monkeypatch: pytest.MonkeyPatch) -> None:
    taken: list[object] = []
    monkeypatch.setattr(os, "sched_setaffinity", lambda pid, cpus: taken.append(cpus))
    monkeypatch.setattr(torch, "set_num_threads", taken.append)
    registration.bind_rank(local_omp_cpuid="0,1")
    assert taken == []
    monkeypatch.setenv("SGLANG_CPU_OMP_THREADS_BIND", "0-2,5|6")
    registration.bind_rank(local_omp_cpuid="0-2,5")
    assert taken == [{0, 1, 2, 5}, 4]


def test_a_bad_cpu_list_says_so() -> None:
    with pytest.raises(ValueError, match=r"SGLANG_CPU_OMP_THREADS_BIND"):
        registration.parse_cpu_list("0-,x")


def test_last_slots() -> None:
    table = torch.arange(12).view(2, 6)
    slots = registration.last_slots(table, torch.tensor([1, 0, 1]), torch.tensor([3, 0, 6]))
    assert slots.tolist() == [8, -1, 11]


def test_ropes_that_upstream_refuses_on_a_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    def upstream(*args: object, **kwargs: object) -> str:
        return "upstream's"

    plain = {"head_size": 16, "rotary_dim": 16, "max_position": 64, "base": 10000}
    yarn = {"rope_type": "deepseek_yarn", "factor": 4.0}
    assert registration.any_rope(upstream, **plain, rope_scaling=yarn, device="cpu") == "upstream's"
    seen = []
    monkeypatch.setattr(factory, "get_rope", lambda **call: seen.append(call))
    registration.any_rope(upstream, 16, 16, 64, 10000, rope_scaling=None, device="cpu")
    assert seen == [{**plain, "rope_scaling": None}]


def test_latent_models_always_read_the_latent_cache() -> None:
    from sglang.srt.models.deepseek_common.attention_backend_handler import AttentionBackendRegistry
    from sglang.srt.models.deepseek_common.attention_forward_methods.forward_methods import AttnForwardMethod

    registration.use_latent_attention()
    choose = AttentionBackendRegistry.get_handler("plain_cpu")
    assert choose(SimpleNamespace(), SimpleNamespace()) == AttnForwardMethod.MLA


def test_workers_know_the_backend() -> None:
    from sglang.srt.layers.attention.attention_registry import ATTENTION_BACKENDS

    registration.register_backend()
    assert "plain_cpu" in ATTENTION_BACKENDS
