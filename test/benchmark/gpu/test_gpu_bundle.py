"""What pack.sh makes without network, and that run.sh runs from it."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]
GPU = ROOT / "benchmark" / "gpu"
EXTENSION = "sglang/srt/mem_cache/rust_tree_core/core.so"
LEFT_OUT = (
    EXTENSION,
    "sglang/multimodal_gen/model.py",
    "sglang/test/runner.py",
    "flashinfer/data/csrc/xqa/mha.cu",
    "flashinfer/data/cutlass/examples/one.cu",
    "sglang/srt/__pycache__/x.pyc",
)
KEPT = ("sglang/srt/server_args.py", "flashinfer/data/csrc/page.cu", "sgl_kernel/sm90/common_ops.so")


def bash(script: str, **variables: str | Path) -> str:
    environment = {**os.environ, **{name: str(value) for name, value in variables.items()}}
    done = subprocess.run(["bash", "-c", script], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture
def parts(tmp_path: Path) -> Path:
    """A bundle of stand-ins, in parts of 400 bytes."""
    wheels = tmp_path / "content"
    for name in (*LEFT_OUT, *KEPT):
        (wheels / name).parent.mkdir(parents=True, exist_ok=True)
        (wheels / name).write_bytes(os.urandom(300))
    script = 'source "$GPU/pack.sh" "$OUT"; part_bytes=400; cp -r "$WHEELS/." "$site"; prune; stand_in; archive'
    bash(script, GPU=GPU, OUT=tmp_path / "parts", WHEELS=wheels)
    return tmp_path / "parts"


def test_the_bundle_comes_in_parts_and_run_puts_them_together(parts: Path, tmp_path: Path) -> None:
    sizes = [file.stat().st_size for file in sorted(parts.glob("part??"))]
    assert len(sizes) > 1
    assert max(sizes) <= 400
    bundle = tmp_path / "bundle"
    run = '"$GPU/run.sh" "$PARTS" "$OUT" "kernels --help"'
    variables = {"GPU": GPU, "BUNDLE": bundle, "OUT": tmp_path / "out", "SCRATCH": tmp_path}
    for place in (str(parts), "-"):  # The second time there are no parts, and none are needed.
        assert "experiment" in bash(run, PARTS=place, PYTHON=sys.executable, **variables)
    site = bundle / "bundle" / "site"
    assert all((site / name).exists() for name in KEPT)
    assert not any((site / name).exists() for name in LEFT_OUT)
    assert (site / "IPython" / "display.py").exists()
    # What is in the checkout goes before what was packed.
    ours = "cached_attention/store.py"
    assert (site / ours).read_text() == (ROOT / ours).read_text()
    assert (site / "sglang/srt/mem_cache/cached_attention/plugin.py").exists()


def test_every_package_is_pinned_and_sglang_as_this_project_pins_it() -> None:
    lines = (GPU / "packages.txt").read_text().splitlines()
    pins = [line for line in lines if not line.startswith("#")]
    assert all(re.fullmatch(r"[\w.-]+==[\w.]+", pin) for pin in pins)
    assert len({pin.split("==")[0].lower() for pin in pins}) == len(pins)
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    (sglang,) = (need for need in project["dependencies"] if need.startswith("sglang"))
    assert sglang in pins
