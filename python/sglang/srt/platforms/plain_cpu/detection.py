"""Detects an accelerator that this torch build could use, without initialising one."""

import glob
import os

import torch
from sglang.srt.platforms.plain_cpu import NAME

NVIDIA_NODES = ("/dev/nvidia[0-9]*", "/dev/nvhost-ctrl-gpu", "/usr/lib/wsl/lib/libcuda.so*")
ROCM_NODES = ("/dev/kfd",)
VENDOR_NODES = {"npu": "/dev/davinci[0-9]*", "hpu": "/dev/accel/accel[0-9]*", "musa": "/dev/mtgpu*"}


def accelerator_in_sight() -> str | None:
    """Name of the accelerator that rules out the plain-CPU platform, or None.

    Device files come first: they answer without loading a driver, and also where a GPU is present but hidden from
    this process (CUDA_VISIBLE_DEVICES in a Ray driver, say), which must not turn a GPU install into a CPU one.
    `SGLANG_PLATFORM=plain_cpu` skips them: an explicit choice gets the CPU unless torch itself would still use
    the GPU.
    """
    if os.environ.get("SGLANG_PLATFORM") != NAME:
        node = _device_file()
        if node is not None:
            return node
    return _device_of_torch()


def _device_file() -> str | None:
    patterns: list[str] = []
    if torch.version.cuda is not None:
        patterns += NVIDIA_NODES
    if torch.version.hip is not None:
        patterns += ROCM_NODES
    patterns += (pattern for vendor, pattern in VENDOR_NODES.items() if _torch_speaks(vendor))
    for pattern in patterns:
        found = glob.glob(pattern)
        if found:
            return found[0]
    return None


def _torch_speaks(vendor: str) -> bool:
    """Whether the vendor's torch extension is installed; a device file is not enough (laptops have NPUs)."""
    from importlib.util import find_spec

    module = {"npu": "torch_npu", "hpu": "habana_frameworks", "musa": "torch_musa"}[vendor]
    return hasattr(torch, vendor) or find_spec(module) is not None


def _device_of_torch() -> str | None:
    if torch.cuda.is_available():
        return "cuda" if torch.version.hip is None else "rocm"
    if torch.xpu.is_available():
        return "xpu"
    if torch.backends.mps.is_available():
        return "mps"
    return None
