"""The package works from an editable install, a normal install and a built wheel."""

from __future__ import annotations

import shutil
import subprocess
import sys
import venv
from importlib.metadata import distribution
from pathlib import Path

import pytest
import sglang

ROOT = Path(__file__).parent.parent
SITE = Path(sglang.__file__).parent.parent
PROBE = """
import cached_attention, importlib.util, pkgutil
for module in pkgutil.walk_packages(cached_attention.__path__, "cached_attention."):
    importlib.import_module(module.name)
import sglang.srt.mem_cache.cached_attention.plugin as plugin
import sglang.srt.platforms.plain_cpu as platform
from importlib.metadata import entry_points
for group in ("sglang.srt.plugins", "sglang.srt.platforms"):
    (ours,) = [e for e in entry_points(group=group) if e.dist.name == "sglang-cached-attention"]
    assert callable(ours.load())
for module in (cached_attention, plugin, platform):
    print(module.__file__)
print(importlib.util.find_spec("sglang.srt.mem_cache.radix_cache").origin)
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


def environment(directory: Path) -> Path:
    """A virtual environment that has all of this one's packages but ours; returns its python.

    SGLang's own files are hard links or copies, because a normal install puts ours beside them.
    """
    venv.create(directory, with_pip=True)
    (site,) = directory.glob("lib/python3*/site-packages")
    # Later on the path than what is installed here, so only `sglang` and our package are found here first.
    (site / "outer.pth").write_text(f"{SITE}\n")
    shutil.copytree(SITE / "sglang", site / "sglang", copy_function=_link, symlinks=True)
    return directory / "bin" / "python"


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


@pytest.mark.parametrize("way", ["editable", "normal", "wheel"])
def test_import(way: str, source: Path, tmp_path: Path) -> None:
    python = environment(tmp_path / "venv")
    pip = [python, "-m", "pip", "install", "-q", "--no-deps", "--disable-pip-version-check"]
    if way == "wheel":
        run(sys.executable, "-m", "build", "--wheel", "--outdir", tmp_path, source, cwd=tmp_path)
        (wheel,) = tmp_path.glob("sglang_cached_attention-*.whl")
        run(*pip, wheel, cwd=tmp_path)
    else:
        run(*pip, *(["-e", source] if way == "editable" else [source]), cwd=tmp_path)
    package, plugin, platform, upstream = map(Path, run(python, "-c", PROBE, cwd=tmp_path).split())
    ours = source if way == "editable" else tmp_path / "venv"
    assert all(ours in path.parents for path in (package, plugin, platform))
    assert tmp_path / "venv" in upstream.parents
    assert _sources(package.parent) == _sources(source / "cached_attention")


def _sources(package: Path) -> set[Path]:
    kinds = {".py", ".cc", ".cu", ".cuh"}
    return {path.relative_to(package) for path in package.rglob("*") if path.suffix in kinds}


def test_the_wheel_owns_no_file_of_upstream() -> None:
    ours = {str(path) for path in distribution("sglang-cached-attention").files or []}
    theirs = {str(path) for path in distribution("sglang").files or []}
    assert ours.isdisjoint(theirs)


def test_licence_and_pin() -> None:
    package = distribution("sglang-cached-attention")
    assert package.metadata["License-Expression"] == "Apache-2.0"
    assert "sglang==0.5.23" in (package.requires or [])
