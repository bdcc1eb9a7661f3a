#!/usr/bin/env bash
# Bundle what a GPU machine without network lacks to run the experiments, in parts under 60 MB.
#
#   benchmark/gpu/pack.sh OUT
#   PRECOMPILED=DIR benchmark/gpu/pack.sh OUT    # FlashInfer modules of benchmark.gpu.precompile: DIR/<name>/<name>.so
#
# OUT gets part00, part01, ... Needs python3 with pip, unzip, strip, xz and PyPI; no GPU and no torch. This package is
# built from the checkout; `make kernels` before it puts its own kernels into the bundle, compiled. Wheels are kept in
# OUT/wheels: a second run downloads nothing. About 3 minutes and 500 MB of downloads.
set -euo pipefail

out=$(mkdir -p "${1:?usage: pack.sh OUT}" && cd "$1" && pwd)
here=$(cd "$(dirname "$0")" && pwd)
checkout=$(cd "$here/../.." && pwd)
wheels=$out/wheels
PYTHON=${PYTHON:-python3}
part_bytes=56000000

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
site=$work/bundle/site
mkdir -p "$site"

fetch() {
    # pip knows only the platform tags it is told, each of them exactly.
    local tags=(any manylinux1_x86_64 manylinux2014_x86_64)
    for glibc in 17 24 26 27 28 31 34; do tags+=("manylinux_2_${glibc}_x86_64"); done
    "$PYTHON" -m pip download --disable-pip-version-check --quiet --no-deps --only-binary=:all: --dest "$wheels" \
        --python-version 3.12 --implementation cp --abi cp312 --abi abi3 --abi none "${tags[@]/#/--platform=}" \
        --requirement "$here/packages.txt"
}

wheel() { echo "$wheels/$1"-*.whl; }

unpack() {
    while read -r requirement; do
        local name=${requirement%%==*}
        local file; file=$(wheel "${name//-/_}")
        case $name in
        # Kernels for Hopper; attention comes from FlashInfer or Triton, so flash_ops (340 MB) stays behind.
        sglang-kernel) unzip -qo "$file" 'sgl_kernel/*.py' 'sgl_kernel/sm90/common_ops*' 'sgl_kernel/spatial_ops*' \
            '*.dist-info/*' -d "$site" ;;
        *) unzip -qo "$file" -d "$site" ;;
        esac
    done < <(grep -v '^#' "$here/packages.txt")
}

# What no Llama needs, and extensions that are built for another torch.
prune() {
    cd "$site"
    rm -rf ./*.data sglang/multimodal_gen sglang/test sglang/benchmark sglang/eval xgrammar/include xgrammar/lib
    rm -rf tools bin share build_backend.py build_utils.py
    find sglang/srt \( -path '*/rust_extensions/*' -o -path '*/server/*' -o -path '*/grpc/*' -o -path '*/multimodal/*' \
        -o -path '*/rust_tree_core/*' \) -name '*.so' -delete
    local data=flashinfer/data
    rm -rf $data/cutlass/{examples,python,test,docs,media,tools/profiler,tools/library}
    rm -rf $data/cccl/{cub,thrust,libcudacxx}/{test,examples,benchmarks,docs}
    rm -rf $data/csrc/{cake_*,kda,gdn*,experimental,fused_moe,nv_internal,trtllm*,xqa,fmha_v2,mamba}
    rm -rf flashinfer/fused_moe/backends/cudnn_frost/artifacts
    [ ! -d flashinfer/experimental ] ||
        find flashinfer/experimental -mindepth 1 -maxdepth 1 -type d ! -name cake_nvfp4_per_token -exec rm -rf {} +
    find . -type d \( -name __pycache__ -o -name tests \) -prune -exec rm -rf {} +
    find . -path ./flashinfer -prune -o \( -name '*.pyi' -o -name '*.pyx' -o -name '*.a' \) -type f -exec rm -f {} +
    find . -path ./sgl_kernel -prune -o -type f \( -name '*.so' -o -name '*.so.[0-9]*' \) \
        -exec strip --strip-unneeded {} +
}

# Imported with SGLang, never called when a Llama is served.
stand_in() {
    mkdir -p "$site/IPython"
    touch "$site/IPython/__init__.py"
    printf 'def display(*_args, **_kwargs): ...\n\n\nclass HTML: ...\n' > "$site/IPython/display.py"
    touch "$site/soundfile.py"
}

# Built beside the checkout, so that it stays clean; with its entry points, through which SGLang finds it.
add_this_package() {
    local source=$work/source built=$work/built
    mkdir "$source"
    cp -r "$checkout"/{cached_attention,python,pyproject.toml,README.md,LICENSE} "$source"
    "$PYTHON" -m pip install --disable-pip-version-check --quiet --no-deps --no-compile --ignore-requires-python \
        --target "$built" "$source"
    rm -rf "$built/bin"
    cp -r "$built/." "$site"
}

# Where FlashInfer looks before it compiles.
add_precompiled() {
    local library name
    for library in "$1"/*/*.so; do
        name=$(basename "$library" .so)
        mkdir -p "$site/flashinfer/data/aot/$name"
        strip --strip-all -o "$site/flashinfer/data/aot/$name/$name.so" "$library"
    done
}

archive() {
    rm -f "$out"/part??
    tar -C "$work" --sort=name --owner=0 --group=0 --mtime=@0 -cf - bundle |
        xz -6e -T2 | split -d -b $part_bytes - "$out/part"
    du -sm "$work/bundle" | awk '{print $1 " MB unpacked"}'
    ls -l "$out"/part??
}

[ "${BASH_SOURCE[0]}" = "$0" ] || return 0 # A shell that reads this file calls the functions by itself.
fetch
unpack
prune
stand_in
add_this_package
[ -z "${PRECOMPILED:-}" ] || add_precompiled "$PRECOMPILED"
archive
