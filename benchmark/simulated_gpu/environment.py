"""Environment of a process that is to see a simulated GPU."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
from hashlib import sha256
from pathlib import Path

from filelock import FileLock

from cached_attention.kernels.compilation import SOURCES, cache_directory
from cached_attention.permissions import make_private

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
RUNTIME = "libcuda_simulated.so"
KERNELS = "kernels.so"
_FLAGS = ("--sampling-backend=pytorch", "--mem-fraction-static=0.5")
SERVER_FLAGS = (*_FLAGS, "--attention-backend=torch_native", "--disable-cuda-graph")
"""With these SGLang uses nothing on the GPU that is not simulated."""
_SIZES = {"decode": {"bs": [1, 2, 4]}, "prefill": {"bs": [64, 256, 512]}}
GRAPH_FLAGS = (*_FLAGS, "--attention-backend=triton", f"--cuda-graph-config={json.dumps(_SIZES)}")
"""With CUDA graphs of decode steps and prefills, as by default. For models whose layers share one pool."""
LIBRARIES = "SIMULATED_GPU"
"""Environment variable: directory of both libraries; its presence means that the process has the GPU."""


def with_gpu(delay: int = 0) -> dict[str, str]:
    """Variables to set for a process that is to see the GPU. Compiles on first use, which takes about 12 seconds.

    Args:
        delay: the most by which transfers, and waits between streams, are late at random; microseconds.

    Raises:
        subprocess.CalledProcessError: there is no C++ compiler, or it failed.
        PermissionError: others can write to the cache directory.
    """
    libraries = _compiled()
    path = [str(HERE / "site"), str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    return {
        LIBRARIES: str(libraries),
        "LD_PRELOAD": str(libraries / RUNTIME),
        "PYTHONPATH": os.pathsep.join(path),
        "SIMULATED_GPU_DELAY": str(delay),
        # SGLang's own kernels have a version in torch.
        "TRITON_INTERPRET": "1",
        "TORCHDYNAMO_DISABLE": "1",
        "SGLANG_FORCE_FUSED_OP_BACKEND": "torch",
        # Compares graphs by a runtime of its own.
        "SGLANG_ENABLE_CUDA_GRAPH_DEDUP": "0",
    }


def _compiled() -> Path:
    digest = sha256()
    for path in [*sorted((HERE / "csrc").iterdir()), *sorted(SOURCES.iterdir()), HERE / "build.py"]:
        digest.update(path.read_bytes())
    kept = cache_directory() / f"simulated_gpu_{platform.machine()}_{digest.hexdigest()[:12]}"
    for directory in (kept.parent.parent, kept.parent):
        make_private(directory)
    with FileLock(kept.with_suffix(".lock")):
        if not kept.exists():
            command = [sys.executable, "-m", "benchmark.simulated_gpu.build", str(kept)]
            subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    return kept
