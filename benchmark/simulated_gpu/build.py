"""Compiles the simulated GPU: `python -m benchmark.simulated_gpu.build DIRECTORY`. Runs in its own process."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path
from tempfile import TemporaryDirectory

from benchmark.simulated_gpu.environment import HERE, KERNELS, RUNTIME
from cached_attention.kernels.compiler import compile_for_cuda, cxx_compiler, toolkit, use_own_ninja

CSRC = HERE / "csrc"


def compile_runtime(output: Path) -> None:
    """One library for runtime and driver: libraries look for the driver by the name that it gets here."""
    sources = [str(CSRC / name) for name in ("runtime.cc", "driver.cc")]
    flags = ["-std=c++17", "-O1", "-shared", "-fPIC", "-pthread", "-Wl,-soname,libcuda.so.1"]
    include = f"-I{toolkit() / 'include'}"
    subprocess.run([cxx_compiler(), *flags, include, *sources, "-o", str(output)], check=True)


def main(directory: Path) -> None:
    use_own_ninja()
    with TemporaryDirectory(dir=directory.parent) as scratch:
        made = Path(scratch) / "made"
        made.mkdir()
        compile_runtime(made / RUNTIME)
        # Nothing runs the code for a GPU, but nvcc insists on making some.
        kernels = compile_for_cuda(["90"], Path(scratch), CSRC / "bodies.cu")
        shutil.copy(kernels, made / KERNELS)
        made.replace(directory)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
