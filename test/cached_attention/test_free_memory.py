"""A share of free memory is a share of what the container may take, not of the machine."""

from __future__ import annotations

from pathlib import Path

import psutil
import pytest

from cached_attention.free_memory import free_memory

MB = 1 << 20


def group(directory: Path, **files: object) -> None:
    directory.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        (directory / name.replace("_of_", ".")).write_text(f"{content}\n")


@pytest.fixture
def root(tmp_path: Path) -> Path:
    (tmp_path / "proc/self").mkdir(parents=True)
    return tmp_path


def inside(root: Path, line: str) -> Path:
    (root / "proc/self/cgroup").write_text(f"{line}\n")
    return root / "sys/fs/cgroup"


def test_the_machine_counts_where_there_are_no_groups(root: Path) -> None:
    for line in (None, "0::/"):
        if line is not None:
            inside(root, line)
        assert free_memory(root) == pytest.approx(psutil.virtual_memory().available, rel=0.2)


@pytest.mark.parametrize("place", ["", "system.slice/server.service"])
def test_the_limit_of_a_container_or_unit(root: Path, place: str) -> None:
    mount = inside(root, "0::/system.slice/server.service")
    stat = f"anon {20 * MB}\ninactive_file {10 * MB}"
    group(mount / place, memory_of_max=100 * MB, memory_of_current=40 * MB, memory_of_stat=stat)
    assert free_memory(root) == 70 * MB


def test_the_tightest_of_several_groups(root: Path) -> None:
    mount = inside(root, "0::/pod/server")
    for place, limit in (("pod/server", "max"), ("pod", 50 * MB), ("", 80 * MB)):
        group(mount / place, memory_of_max=limit, memory_of_current=20 * MB, memory_of_stat="inactive_file 0")
    assert free_memory(root) == 30 * MB


def test_the_first_version_of_groups(root: Path) -> None:
    mount = inside(root, "4:memory:/docker/0123") / "memory/docker/0123"
    stat = f"inactive_file 0\ntotal_inactive_file {MB}"
    files = {"memory_of_limit_in_bytes": 10 * MB, "memory_of_usage_in_bytes": 30 * MB, "memory_of_stat": stat}
    group(mount, **files)
    assert free_memory(root) == 0
