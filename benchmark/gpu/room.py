"""What fits: the host memory that an experiment pins, and the space on disk that it fills."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import NamedTuple

import psutil

from cached_attention.free_memory import free_memory
from cached_attention.units import format_size


class NoRoomError(RuntimeError):
    """An experiment needs more memory, or more of a disk, than there is."""


class HostMemory(NamedTuple):
    """Host memory before an experiment, and what of it the experiment needs; bytes."""

    total: int
    """MemTotal."""
    available: int
    """MemAvailable."""
    free: int
    """The same, within the limit of the container."""
    pinned: int
    """What the experiment pins at the same time."""

    @classmethod
    def now(cls, pinned: int) -> HostMemory:
        memory = psutil.virtual_memory()
        return cls(memory.total, memory.available, free_memory(), pinned)

    def __str__(self) -> str:
        sizes = [format_size(size) for size in self]
        return "host memory: {} in all, {} available ({} to this container), {} to be pinned".format(*sizes)

    def require(self) -> None:
        """Raise NoRoomError if what is to be pinned does not fit."""
        if self.pinned > self.free:
            raise NoRoomError(
                f"the experiment pins {format_size(self.pinned)} of host memory and {format_size(self.free)} are "
                f"free: use a machine with more, end what uses it, or choose a smaller shape."
            )


def require_disk(directory: Path, size: int) -> None:
    """Raise NoRoomError if the disk of `directory` has less than `size` bytes free."""
    free = shutil.disk_usage(directory).free
    if size > free:
        raise NoRoomError(
            f"the experiment writes {format_size(size)} and {directory} has {format_size(free)} free: "
            f"choose a directory on another disk with --scratch."
        )


def file_system(directory: Path) -> str:
    """Type of the file system that `directory` is on, such as `ext4`."""
    place = directory.resolve()
    mounts = [part for part in psutil.disk_partitions(all=True) if place.is_relative_to(part.mountpoint)]
    return max(mounts, key=lambda part: len(part.mountpoint)).fstype if mounts else "unknown"
