"""Environment of a process that is to see a simulated GPU."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from hashlib import sha256
from pathlib import Path

from cached_attention.kernels.compilation import SOURCES, cache_directory
from filelock import FileLock

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
RUNTIME = "libcuda_simulated.so"
KERNELS = "kernels.so"
LIBRARIES = "SIMULATED_GPU"
"""Environment variable: directory of both libraries; its presence means that the process has the GPU."""


def with_gpu(delay: int = 0) -> dict[str, str]:
    """What to add to the environment of this process for another one. Compiles on first use, for about 12 seconds.

    Args:
        delay: microseconds by which some work is late at most.
    """
    libraries = _compiled()
    path = [str(HERE / "site"), str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    return {
        LIBRARIES: str(libraries),
        "LD_PRELOAD": str(libraries / RUNTIME),
        "PYTHONPATH": os.pathsep.join(path),
        "SIMULATED_GPU_DELAY": str(delay),
        # SGLang's kernels: those in torch and Triton are replaced, all others have a version in torch.
        "TRITON_INTERPRET": "1",
        "TORCHDYNAMO_DISABLE": "1",
        "SGLANG_FORCE_FUSED_OP_BACKEND": "torch",
    }


def _compiled() -> Path:
    digest = sha256()
    for path in [*sorted((HERE / "csrc").iterdir()), *sorted(SOURCES.iterdir()), HERE / "build.py"]:
        digest.update(path.read_bytes())
    kept = cache_directory() / f"simulated_gpu_{platform.machine()}_{digest.hexdigest()[:12]}"
    kept.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(kept.with_suffix(".lock")):
        if not kept.exists():
            command = [sys.executable, "-m", "benchmark.simulated_gpu.build", str(kept)]
            subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    return kept
