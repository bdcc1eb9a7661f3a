"""An editable install, a normal install and a built wheel work beside a wheel and beside a checkout of SGLang."""

from __future__ import annotations

import shutil
import subprocess
import sys
import venv
import zipfile
from importlib.metadata import distribution
from pathlib import Path

import pytest
import sglang

ROOT = Path(__file__).parent.parent
SITE = Path(sglang.__file__).parent.parent
PROBE = """
import argparse, cached_attention, importlib.util, pkgutil
for module in pkgutil.walk_packages(cached_attention.__path__, "cached_attention."):
    importlib.import_module(module.name)
from sglang.srt.plugins import load_plugins
from sglang.srt.server_args import ServerArgs
load_plugins()
parser = argparse.ArgumentParser()
ServerArgs.add_cli_args(parser)
assert parser.parse_args(["--model-path=m", "--enable-cached-attention"]).enable_cached_attention
import sglang.srt.mem_cache.cached_attention.plugin as plugin
import sglang.srt.platforms.plain_cpu as platform
for module in (cached_attention, plugin, platform):
    print(module.__file__)
print(importlib.util.find_spec("sglang.srt.mem_cache.radix_cache").origin)
"""
PIP_INSTALL = ("-m", "pip", "install", "-q", "--no-deps", "--disable-pip-version-check")
PROJECT_OF_SGLANG = """
[build-system]
requires = ["setuptools"]
build-backend = "setuptools.build_meta"
[project]
name = "sglang"
version = "0.5.23"
[tool.setuptools.packages.find]
include = ["sglang*"]
"""


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of what is committed or about to be, so that builds leave nothing in the checkout."""
    copy = tmp_path_factory.mktemp("source") / "repo"
    listed = ["git", "ls-files", "--cached", "--others", "--exclude-standard"]
    for name in subprocess.run(listed, cwd=ROOT, capture_output=True, text=True, check=True).stdout.split("\n"):
        if name and (ROOT / name).is_file():
            (copy / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, copy / name)
    return copy


def environment(directory: Path, *, sglang_from: str) -> Path:
    """A virtual environment that has all of this one's packages but ours; returns its python.

    Args:
        sglang_from: "wheel", or "checkout": installed with `pip install -e python`, as in SGLang's own images.
    """
    venv.create(directory, with_pip=True)
    python = directory / "bin" / "python"
    (site,) = directory.glob("lib/python3*/site-packages")
    outer = directory / "outer"
    outer.mkdir()
    (site / "outer.pth").write_text(f"{outer}\n")
    for package in SITE.iterdir():
        if package.suffix != ".pth" and not package.name.startswith(("sglang", "__editable__")):
            (outer / package.name).symlink_to(package)
    if sglang_from == "wheel":
        for package in SITE.glob("sglang*"):
            if not package.name.startswith("sglang_cached_attention"):
                (outer / package.name).symlink_to(package)
    else:
        checkout = directory / "checkout" / "python"
        shutil.copytree(SITE / "sglang", checkout / "sglang", copy_function=_link, symlinks=True)
        (checkout / "pyproject.toml").write_text(PROJECT_OF_SGLANG)
        run(python, *PIP_INSTALL, "-e", checkout, cwd=directory)
    return python


def _link(source: str, target: str) -> str:
    try:
        Path(target).hardlink_to(source)
    except OSError:
        shutil.copy2(source, target)
    return target


def run(*command: str | Path, cwd: Path) -> str:
    done = subprocess.run(list(map(str, command)), cwd=cwd, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.parametrize(
    ("way", "sglang_from"),
    [("editable", "wheel"), ("normal", "wheel"), ("editable", "checkout"), ("wheel", "checkout")],
)
def test_import(way: str, sglang_from: str, source: Path, tmp_path: Path) -> None:
    python = environment(tmp_path / "venv", sglang_from=sglang_from)
    if way == "wheel":
        run(sys.executable, "-m", "build", "--wheel", "--outdir", tmp_path, source, cwd=tmp_path)
        (wheel,) = tmp_path.glob("sglang_cached_attention-*.whl")
        # A directory `sglang` in site-packages would hide a checkout of SGLang.
        assert {name.split("/")[0] for name in zipfile.ZipFile(wheel).namelist()} == {
            "cached_attention",
            "sglang_cached_attention",
            f"{wheel.name.partition('-py3')[0]}.dist-info",
        }
        run(python, *PIP_INSTALL, wheel, cwd=tmp_path)
    else:
        run(python, *PIP_INSTALL, *(["-e", source] if way == "editable" else [source]), cwd=tmp_path)
    package, plugin, platform, upstream = map(Path, run(python, "-c", PROBE, cwd=tmp_path).split()[-4:])
    ours = source if way == "editable" else tmp_path / "venv"
    assert all(ours in path.parents for path in (package, plugin, platform))
    assert tmp_path / "venv" / ("checkout" if sglang_from == "checkout" else "outer") in upstream.parents
    assert _sources(package.parent) == _sources(source / "cached_attention")


def _sources(package: Path) -> set[Path]:
    kinds = {".py", ".cc", ".cu", ".cuh"}
    return {path.relative_to(package) for path in package.rglob("*") if path.suffix in kinds}


def test_licence_and_pin() -> None:
    package = distribution("sglang-cached-attention")
    assert package.metadata["License-Expression"] == "Apache-2.0"
    assert "sglang==0.5.23" in (package.requires or [])
