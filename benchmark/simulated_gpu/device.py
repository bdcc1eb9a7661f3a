"""Makes the simulated GPU known to torch, Triton and this package, in the process that calls `install`."""

from __future__ import annotations

import ctypes
import os
from pathlib import Path
from typing import Any

from benchmark.simulated_gpu.environment import KERNELS, LIBRARIES

_kept: list[Any] = []


def install() -> None:
    """Call once, in a process with the environment of `environment.with_gpu`, before anything uses the GPU."""
    import torch
    import tvm_ffi

    from benchmark.simulated_gpu.operators import use_cpu_operators

    _kept.append(use_cpu_operators())
    for choose in ("flash", "mem_efficient", "cudnn"):
        getattr(torch.backends.cuda, f"enable_{choose}_sdp")(False)
    kernels = tvm_ffi.load_module(str(Path(os.environ[LIBRARIES]) / KERNELS))
    kernels.add_kernels()
    _kept.append(kernels)
    _bind_runtime()
    _interpret_triton()


def _bind_runtime() -> None:
    """`cuda.bindings` contains a runtime of its own; its calls about streams go to the simulated one."""
    from cuda.bindings import runtime

    simulated = ctypes.CDLL(None)

    def priorities() -> tuple[int, int, int]:
        least, greatest = ctypes.c_int(), ctypes.c_int()
        error = simulated.cudaDeviceGetStreamPriorityRange(ctypes.byref(least), ctypes.byref(greatest))
        return error, least.value, greatest.value

    def create(flags: int, priority: int) -> tuple[int, int | None]:
        handle = ctypes.c_void_p()
        error = simulated.cudaStreamCreateWithPriority(ctypes.byref(handle), flags, priority)
        simulated.simulated_gpu_mark_transfers(handle)
        return error, handle.value

    def capture_info(stream: int) -> tuple[int, Any, int]:
        status, number = ctypes.c_int(), ctypes.c_ulonglong()
        asked = (ctypes.byref(status), ctypes.byref(number), None, None, None, None)
        error = simulated.cudaStreamGetCaptureInfo(ctypes.c_void_p(stream), *asked)
        return error, runtime.cudaStreamCaptureStatus(status.value), number.value

    runtime.cudaSetDevice = lambda device: (simulated.cudaSetDevice(device),)
    runtime.cudaDeviceGetStreamPriorityRange = priorities
    runtime.cudaStreamGetCaptureInfo = capture_info
    runtime.cudaStreamCreateWithPriority = create


def _interpret_triton() -> None:
    import triton.language as tl
    from triton.runtime import driver

    for name in ("gdc_wait", "gdc_launch_dependents"):  # Of which the interpreter knows nothing.
        setattr(tl.extra.cuda, name, lambda **_: None)
    driver.set_active(TritonDriver())


class TritonDriver:
    """What is asked about the GPU before a kernel is interpreted."""

    def get_current_target(self) -> Any:
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", 90, 32)

    def get_active_torch_device(self) -> Any:
        import torch

        return torch.device("cuda", 0)

    def get_current_device(self) -> int:
        return 0

    def get_device_interface(self) -> Any:
        import torch

        return torch.cuda
