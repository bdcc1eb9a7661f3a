"""Compiles `csrc/` for one target: `python compiler.py TARGET OUTPUT`. Runs in its own process."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory

SOURCES = Path(__file__).parent / "csrc"

UNCONTRACTED = "-ffp-contract=off"
"""A fused multiply-add would round once where the torch reference rounds twice."""

MIXED_VERSIONS = "-DCCCL_DISABLE_CTK_COMPATIBILITY_CHECK"
"""pip installs compiler and runtime headers that differ in the minor version."""


def compile_for_cpu(scratch: Path) -> Path:
    """Compile with the host's C++ compiler for this machine's instruction set."""
    from tvm_ffi.cpp import build

    flags = ["-O3", "-march=native", UNCONTRACTED]
    source = SOURCES / "rope_on_load_cpu.cc"
    return Path(build("rope_on_load", sources=str(source), extra_cflags=flags, build_directory=str(scratch)))


def compile_for_cuda(architectures: list[str], scratch: Path, source: Path = SOURCES / "kernels.cu") -> Path:
    """Compile through FlashInfer's JIT; needs neither a GPU nor a driver.

    Args:
        architectures: e.g. `80`, `90a`. If there are several, PTX for the first is added.
        source: may include files of `SOURCES`.
    """
    home = toolkit()
    os.environ["CUDA_HOME"] = str(home)
    os.environ["FLASHINFER_WORKSPACE_BASE"] = str(scratch)
    os.environ["FLASHINFER_CUDA_ARCH_LIST"] = "9.0a"  # FlashInfer insists on one; the real ones are given below.
    from flashinfer.jit.core import gen_jit_spec

    targets = [f"arch=compute_{name},code=sm_{name}" for name in architectures]
    if len(architectures) > 1:
        targets.append(f"arch=compute_{architectures[0]},code=compute_{architectures[0]}")
    spec = gen_jit_spec(
        "cached_attention_kernels",
        [source],
        extra_cuda_cflags=[
            *(f"-gencode={name}" for name in targets),
            f"-Xcompiler={UNCONTRACTED}",
            MIXED_VERSIONS,
        ],
        extra_ldflags=[f"-L{link_stubs(home, scratch)}"],
        extra_include_paths=[SOURCES],
        use_fast_math=False,
    )
    spec.build()
    return Path(spec.get_library_path())


def toolkit() -> Path:
    """The CUDA toolkit to compile with, of the version that torch was built for.

    `CUDA_HOME`, else the toolkit that pip installed with SGLang, else that of the nvcc on PATH.
    """
    wanted, found = cuda_runtime(), {home: _version(home) for home in _toolkits()}
    for home, version in found.items():
        if version is not None and wanted in (version, None):
            return home
    others = "".join(f" {home} has {version or 'no headers'}." for home, version in found.items())
    sys.exit(
        f"There is no CUDA compiler of version {wanted}, for which torch was built: install one with "
        f"`pip install nvidia-cuda-nvcc`, or set CUDA_HOME.{others}"
    )


def cuda_runtime() -> str | None:
    """Major version of the CUDA runtime that torch loads, such as `13`; None if it loads none."""
    import torch

    return torch.version.cuda and torch.version.cuda.partition(".")[0]


def _toolkits() -> Iterator[Path]:
    if home := os.environ.get("CUDA_HOME"):
        yield Path(home)
    packages = find_spec("nvidia")
    for root in (packages.submodule_search_locations or []) if packages else []:
        for nvcc in sorted(Path(root).glob("cu*/bin/nvcc"), reverse=True):
            yield nvcc.parent.parent
    if nvcc_on_path := shutil.which("nvcc"):
        yield Path(nvcc_on_path).resolve().parent.parent


def _version(home: Path) -> str | None:
    """Major version of a toolkit; None if it has no headers."""
    try:
        header = (home / "include" / "cuda_runtime_api.h").read_text()
    except OSError:
        return None
    match = re.search(r"#define CUDART_VERSION +(\d+)", header)
    return match and str(int(match[1]) // 1000)


def link_stubs(home: Path, scratch: Path) -> Path:
    """Directory for the linker with what a toolkit from pip lacks: the driver, and unversioned library names."""
    stubs = scratch / "stubs"
    stubs.mkdir()
    empty = stubs / "empty.c"
    empty.touch()
    driver = ["-shared", "-fPIC", "-Wl,-soname,libcuda.so.1", "-o", str(stubs / "libcuda.so"), str(empty)]
    subprocess.run([cxx_compiler(), *driver], check=True)
    for runtime in (home / "lib").glob("libcudart.so.*"):
        (stubs / "libcudart.so").symlink_to(runtime)
        break
    return stubs


def cxx_compiler() -> str:
    compiler = os.environ.get("CXX", "c++")
    if not shutil.which(compiler):
        sys.exit(f"There is no C++ compiler {compiler!r}: install g++, or set CXX.")
    return compiler


def use_own_ninja() -> None:
    """Put ninja on PATH: both build systems call it, and pip may have installed it elsewhere."""
    if find_spec("ninja"):
        import ninja

        os.environ["PATH"] = os.pathsep.join((ninja.BIN_DIR, os.environ.get("PATH", "")))
    elif not shutil.which("ninja"):
        sys.exit("There is no ninja: install it with `pip install ninja`.")


def main(target: str, output: Path) -> None:
    cxx_compiler()
    use_own_ninja()
    with TemporaryDirectory() as directory:
        scratch = Path(directory)
        try:
            built = compile_for_cpu(scratch) if target == "cpu" else compile_for_cuda(target.split("_"), scratch)
        except RuntimeError as error:
            lines = str(error).splitlines()
            sys.exit(next((line for line in lines if "error" in line.lower()), lines[-1]))
        staged = output.with_suffix(f".{os.getpid()}")
        shutil.copy(built, staged)
        staged.replace(output)


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
