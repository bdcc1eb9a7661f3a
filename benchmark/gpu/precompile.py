"""Compiles FlashInfer's kernels for Hopper without a GPU, for the bundle of `pack.sh`.

    python -m benchmark.gpu.precompile out/modules
    PRECOMPILED=out/modules benchmark/gpu/pack.sh out/bundle

These are the kernels that SGLang needs to serve the Llamas of the experiments: prefill over paged KV, and decode,
in bfloat16 with heads of 128. Kernels missing from a bundle are compiled on the GPU machine at first use.
"""

from __future__ import annotations

import argparse
import os
import shutil
from collections.abc import Sequence
from pathlib import Path

import torch
from tqdm import tqdm

from cached_attention.kernels.compiler import MIXED_VERSIONS, link_stubs, toolkit, use_own_ninja

HEAD_DIM = 128
NO_ROPE = 0


def prepare(scratch: Path) -> None:
    """Set the environment of FlashInfer's JIT; call before FlashInfer is imported."""
    home = toolkit()
    scratch.mkdir(parents=True, exist_ok=True)
    stubs = scratch / "stubs"
    if stubs.exists():
        shutil.rmtree(stubs)
    os.environ |= {
        "CUDA_HOME": str(home),
        "FLASHINFER_WORKSPACE_BASE": str(scratch),
        "FLASHINFER_CUDA_ARCH_LIST": "9.0a",
        "FLASHINFER_EXTRA_CUDAFLAGS": MIXED_VERSIONS,
        "FLASHINFER_EXTRA_LDFLAGS": f"-L{link_stubs(home, scratch)}",
    }
    use_own_ninja()


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output", type=Path, help="gets NAME/NAME.so, and .build, which may be removed")
    output: Path = parser.parse_args(arguments).output.absolute()
    prepare(output / ".build")
    from flashinfer.jit.attention.modules import gen_batch_decode_module, gen_batch_prefill_module

    kv = (torch.bfloat16, torch.bfloat16, torch.bfloat16, torch.int32, HEAD_DIM, HEAD_DIM, NO_ROPE)
    window, soft_cap, half_precision = False, False, False
    specs = [
        gen_batch_decode_module(*kv, window, soft_cap),
        gen_batch_prefill_module("fa2", *kv, window, soft_cap, half_precision),
    ]
    for spec in tqdm(specs, "modules", unit="module"):
        spec.build()
        target = output / spec.name / f"{spec.name}.so"
        target.parent.mkdir(exist_ok=True)
        shutil.copy(spec.get_library_path(), target)
        tqdm.write(f"{target}: {target.stat().st_size:,} bytes")


if __name__ == "__main__":
    main()
