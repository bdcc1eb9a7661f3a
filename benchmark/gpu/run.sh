#!/usr/bin/env bash
# Run experiments on a GPU machine without network, from a checkout and the bundle of pack.sh, one after the other.
#
#   benchmark/gpu/run.sh PARTS OUTPUT "[SECONDS] NAME [ARGUMENT ...]" ...
#   benchmark/gpu/run.sh out/bundle out/gpu "90 kernels" "overlap --shape llama-2-13b"
#
# PARTS is the directory with part00, part01, ... It is unpacked once, into $BUNDLE; after that any PARTS will do, also
# `-`. This package's Python code is taken from the checkout each time. Each of the last arguments is an experiment, as
# `python -m benchmark.gpu` takes it, ended after SECONDS, or $LIMIT; the next one runs whatever became of it.
#
# OUTPUT, flat, gets NAME-SHAPE.json of each, table.md, and logs.tgz: what was printed, and the logs of all servers of
# this call. They are there also when an experiment, or all of this, is ended early. Models and the pages of `disk` go
# below $SCRATCH, to a directory that is removed at the end: for `disk` it must be on the disk to be measured.
# The status is that of the first experiment that did not end with 0.
set -euo pipefail

CHECKOUT=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)
BUNDLE=${BUNDLE:-/tmp/cached-attention-bundle}
SCRATCH=${SCRATCH:-/tmp}
LIMIT=${LIMIT:-480}
PYTHON=${PYTHON:-python3}
# Seconds from SIGTERM to SIGKILL: all servers are asked to end at once, and killed after 15 s, which may take as long.
GRACE=${GRACE:-60}

unpack() { # PARTS
    [ ! -e "$BUNDLE/complete" ] || return 0
    mkdir -p "$BUNDLE"
    cat "$1"/part?? | "$PYTHON" -c '
import sys, tarfile
tarfile.open(fileobj=sys.stdin.buffer, mode="r|xz").extractall(sys.argv[1], filter="fully_trusted")' "$BUNDLE"
    touch "$BUNDLE/complete"
}

prepare() {
    local site=$BUNDLE/bundle/site nvcc
    cp -r "$CHECKOUT/cached_attention" "$site"
    cp -r "$CHECKOUT/python/." "$site"
    export PYTHONPATH=$site${PYTHONPATH:+:$PYTHONPATH} PYTHONUNBUFFERED=1
    export HF_HUB_OFFLINE=1 TRANSFORMERS_OFFLINE=1
    # sglang-kernel is older than the version SGLang asks for, and its tree in Rust is built for another torch.
    export SGLANG_SKIP_SGL_KERNEL_VERSION_CHECK=1 SGLANG_UNIFIED_RADIX_TREE_CORE_BACKEND=python
    # Prefill modules of one kind are enough: those for paged KV.
    export SGLANG_FLASHINFER_USE_PAGED=1 FLASHINFER_WORKSPACE_BASE=$BUNDLE/flashinfer
    if nvcc=$(command -v nvcc); then
        export CUDA_HOME=${CUDA_HOME:-$(dirname "$(dirname "$(readlink -f "$nvcc")")")}
    fi
}

# Servers have process groups of their own, and may outlive an experiment that was killed. All of their processes, and
# nobody else's, write to a log in the scratch directory.
end_servers() {
    local process
    for process in /proc/[0-9]*; do
        case $(readlink "$process/fd/1" 2> /dev/null || true) in
        "$scratch"/logs/*) kill -KILL "${process#/proc/}" 2> /dev/null || true ;;
        esac
    done
}

experiment() { # "[SECONDS] NAME [ARGUMENT ...]"
    local words limit=$LIMIT status=0
    read -ra words <<< "$1"
    if [[ ${words[0]} =~ ^[0-9]+$ ]]; then
        limit=${words[0]}
        words=("${words[@]:1}")
    fi
    printf '\n== %s (%s s)\n' "${words[*]}" "$limit"
    # In the background, since bash runs no trap while it waits for a command in the foreground.
    timeout --kill-after="$GRACE" "$limit" "$PYTHON" -m benchmark.gpu "${words[@]}" \
        --output "$output" --scratch "$scratch" > >(tee -a "$scratch/printed.log") 2>&1 &
    running=$!
    wait "$running" || status=$?
    running=
    end_servers
    pack_logs
    [ "$status" != 124 ] || echo "ended after $limit s: ${words[*]}"
    return "$status"
}

pack_logs() {
    (cd "$scratch" && find . \( -path './logs/*' -o -name printed.log \) -type f -print0 |
        tar -czf "$output/logs.tgz" --null --files-from=-) || echo "logs.tgz may lack some logs"
}

stop() {
    if [ -n "$running" ]; then
        kill -TERM "$running" 2> /dev/null || true
        while kill -0 "$running" 2> /dev/null; do wait "$running" || true; done
    fi
    exit 143 # The trap of EXIT does the rest.
}

finish() {
    end_servers
    pack_logs
    rm -rf "$scratch"
}

main() {
    local usage='usage: run.sh PARTS OUTPUT "[SECONDS] NAME [ARGUMENT ...]" ...' result=0 status one
    local parts=${1:?$usage}
    output=$(mkdir -p "${2:?$usage}" && cd "$2" && pwd)
    : "${3:?$usage}"
    shift 2
    unpack "$parts"
    prepare
    scratch=$(mktemp -d "$(readlink -f "$SCRATCH")/cached-attention-run.XXXXXX")
    running=
    trap finish EXIT
    trap stop TERM INT HUP
    cd "$CHECKOUT"
    for one; do
        status=0
        experiment "$one" || status=$?
        [ "$result" != 0 ] || result=$status
    done
    return "$result"
}

[ "${BASH_SOURCE[0]}" = "$0" ] || return 0 # A shell that reads this file calls the functions by itself.
main "$@"
