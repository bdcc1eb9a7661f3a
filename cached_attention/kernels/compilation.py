"""Finds or builds the shared libraries of `csrc/`: shipped ones first, then those compiled earlier."""

from __future__ import annotations

import logging
import os
import platform
import subprocess
import sys
from contextlib import AbstractContextManager
from functools import cache
from hashlib import sha256
from pathlib import Path
from typing import Any

from cached_attention.kernels.compiler import cuda_runtime
from cached_attention.permissions import make_private

logger = logging.getLogger(__name__)

SOURCES = Path(__file__).parent / "csrc"
SHIPPED = Path(__file__).parent / "lib"
"""Where `make kernels` puts the libraries that go into the wheel."""

CPU = "cpu"
ALL_GPUS = "80_90a_100"
"""Target built ahead of time."""
SHIPPED_FOR = (8, 9, 10)
"""Major compute capabilities that run it natively. Its PTX runs on others only if the driver is new enough."""


class CompilationError(RuntimeError):
    """No library could be built; the message is the compiler's output, or says what is missing."""


def library_name(target: str) -> str:
    """File name of the library for `target`: `CPU`, or CUDA architectures joined by underscores.

    Contains a digest of the sources, so that a stale library is never loaded, the host's architecture, and the
    version of torch's CUDA runtime, because a library for another one cannot be loaded.
    """
    digest = sha256()
    for path in [*sorted(SOURCES.iterdir()), Path(__file__).with_name("compiler.py")]:
        digest.update(path.name.encode() + b"\0" + path.read_bytes())
    runtime = "" if target == CPU else f"_cu{cuda_runtime() or 0}"
    return f"kernels_{target}{runtime}_{platform.machine()}_{digest.hexdigest()[:12]}.so"


def cuda_target(capability: tuple[int, int]) -> str:
    """Target for a GPU of this compute capability."""
    if capability[0] in SHIPPED_FOR and (SHIPPED / library_name(ALL_GPUS)).exists():
        return ALL_GPUS
    return "90a" if capability == (9, 0) else "{}{}".format(*capability)


@cache
def load_library(target: str) -> Any | None:
    """Load the module for `target`; None, with one warning in the log, if it can neither be found nor compiled.

    Compiling takes tens of seconds, once per machine. Processes that need the same library wait for the one that
    compiles it.
    """
    try:
        import tvm_ffi

        path = _library_for(target)
        made = path.stat().st_mtime_ns
        try:
            return tvm_ffi.load_module(str(path))
        except (RuntimeError, OSError) as error:
            logger.warning("%s cannot be loaded, and is replaced by one compiled here: %s", path, error)
            return tvm_ffi.load_module(str(_compile_in_place_of(path, made, target)))
    except (ImportError, RuntimeError, OSError) as error:
        logger.warning("Pages are moved with torch, which is slower: the kernels were not compiled: %s", error)
    return None


def _library_for(target: str) -> Path:
    """The library for `target`; if it cannot be compiled here, the one for all GPUs, whose PTX may run."""
    try:
        return find_or_compile(target)
    except (CompilationError, OSError):
        shipped = SHIPPED / library_name(ALL_GPUS)
        if target == CPU or not shipped.exists():
            raise
        return shipped


def find_or_compile(target: str) -> Path:
    """Path of the library for `target`, compiled if necessary.

    Raises:
        CompilationError: there is no compiler, or it failed.
        PermissionError: others can write to the cache directory.
        OSError: the cache directory cannot be written.
    """
    shipped = SHIPPED / library_name(target)
    if shipped.exists():
        return shipped
    kept = _kept(target)
    if not kept.exists():
        with _compiling(kept):
            if not kept.exists():
                compile_library(target, kept)
    return kept


def _compile_in_place_of(bad: Path, made: int, target: str) -> Path:
    """A library of this machine, where `bad`, of the time `made`, does not load; another process may have it."""
    kept = _kept(target)
    with _compiling(kept):
        if not kept.exists() or (kept == bad and kept.stat().st_mtime_ns == made):
            compile_library(target, kept)
    return kept


def _kept(target: str) -> Path:
    kept = cache_directory() / library_name(target)
    for directory in (kept.parent.parent, kept.parent):
        make_private(directory)  # Anything others put there would run in this process.
    return kept


def _compiling(kept: Path) -> AbstractContextManager[object]:
    """Context in which no other process compiles the same library."""
    from filelock import FileLock

    return FileLock(kept.with_suffix(".lock"))


def cache_directory() -> Path:
    """One directory per instruction set, because a home directory may be shared by different machines."""
    root = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return root / "cached-attention" / f"{platform.machine()}-{_instruction_set()}"


def _instruction_set() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    flags = next((line for line in lines if line.lower().startswith(("flags", "features"))), "")
    return sha256(flags.encode()).hexdigest()[:8]


def compile_library(target: str, output: Path) -> None:
    """Compile in a subprocess, which keeps the toolkit's environment variables out of this process.

    Raises:
        CompilationError: see `find_or_compile`.
    """
    logger.info("Compiling kernels for %s: once, less than a minute.", target)
    script = Path(__file__).with_name("compiler.py")
    command = [sys.executable, "-P", str(script), target, str(output)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise CompilationError(done.stderr.strip() or f"the compiler ended with status {done.returncode}")
