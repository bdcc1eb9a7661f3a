#!/usr/bin/env bash
# Run one experiment on a GPU machine without network, from a checkout and the bundle of pack.sh.
#
#   benchmark/gpu/run.sh PARTS NAME [ARGUMENT ...]    # arguments of `python -m benchmark.gpu NAME`
#
# PARTS is the directory with part00, part01, ... It is unpacked once, into $BUNDLE; after that any PARTS will do, also
# `-`. This package's Python code is taken from the checkout each time. Ends the experiment after $LIMIT seconds.
set -euo pipefail

parts=${1:?usage: run.sh PARTS NAME [ARGUMENT ...]}
shift
checkout=$(cd "$(dirname "$0")/../.." && pwd)
BUNDLE=${BUNDLE:-/tmp/cached-attention-bundle}
LIMIT=${LIMIT:-480}
PYTHON=${PYTHON:-python3}

if [ ! -e "$BUNDLE/complete" ]; then
    mkdir -p "$BUNDLE"
    cat "$parts"/part?? | "$PYTHON" -c '
import sys, tarfile
tarfile.open(fileobj=sys.stdin.buffer, mode="r|xz").extractall(sys.argv[1], filter="fully_trusted")' "$BUNDLE"
    touch "$BUNDLE/complete"
fi
site=$BUNDLE/bundle/site
cp -r "$checkout/cached_attention" "$site"
cp -r "$checkout/python/." "$site"

export PYTHONPATH=$site${PYTHONPATH:+:$PYTHONPATH} PYTHONUNBUFFERED=1
export HF_HUB_OFFLINE=1 TRANSFORMERS_OFFLINE=1
# sglang-kernel is older than the version SGLang asks for, and its tree in Rust is built for another torch.
export SGLANG_SKIP_SGL_KERNEL_VERSION_CHECK=1 SGLANG_UNIFIED_RADIX_TREE_CORE_BACKEND=python
# Prefill modules of one kind are enough: those for paged KV.
export SGLANG_FLASHINFER_USE_PAGED=1 FLASHINFER_WORKSPACE_BASE=$BUNDLE/flashinfer
if nvcc=$(command -v nvcc); then
    export CUDA_HOME=${CUDA_HOME:-$(dirname "$(dirname "$(readlink -f "$nvcc")")")}
fi

cd "$checkout"
exec timeout --kill-after=30 "$LIMIT" "$PYTHON" -m benchmark.gpu "$@"
