"""Free host memory, on the machine and within the container or systemd unit of this process."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import psutil


class _Files(NamedTuple):
    """Names by which a version of control groups calls the limit, the usage and the reclaimable cache."""

    limit: str
    used: str
    cache: str


_V2 = _Files("memory.max", "memory.current", "inactive_file")
_V1 = _Files("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")


def free_memory(root: Path = Path("/")) -> int:
    """Bytes free on this machine, or within the tightest control group around this process if that is less.

    `root`: directory in which `proc` and `sys` are mounted.
    """
    return min([psutil.virtual_memory().available, *_left_in_groups(root)])


def _left_in_groups(root: Path) -> Iterator[int]:
    try:
        lines = (root / "proc/self/cgroup").read_text().splitlines()
    except OSError:
        return
    mount = root / "sys/fs/cgroup"
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if not controllers:
            yield from _left_along(mount, path, _V2)
        elif "memory" in controllers.split(","):
            yield from _left_along(mount / "memory", path, _V1)


def _left_along(mount: Path, path: str, files: _Files) -> Iterator[int]:
    """Bytes left in the group and in each group around it; inside a container only `mount` itself may exist."""
    group = Path(path.lstrip("/"))
    for directory in (mount / place for place in (group, *group.parents)):
        try:
            limit = int((directory / files.limit).read_text())
            used = int((directory / files.used).read_text())
            stat = dict(line.split() for line in (directory / "memory.stat").read_text().splitlines())
        except (OSError, ValueError):
            continue  # Missing, or "max": no limit.
        yield max(0, limit - used + int(stat.get(files.cache, 0)))
