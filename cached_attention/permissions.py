"""Directories that nobody else can write to, so that their contents can be trusted."""

from __future__ import annotations

import os
import stat
from pathlib import Path

_WRITABLE_BY_OTHERS = stat.S_IWGRP | stat.S_IWOTH


def make_private(directory: Path) -> None:
    """Create `directory` and its missing parents with mode 0700; leave the modes of existing ones.

    Raises:
        PermissionError: it exists, and others can write to it.
        OSError: it cannot be created.
    """
    missing = [path for path in (directory, *directory.parents) if not path.exists()]
    for path in reversed(missing):
        path.mkdir(mode=0o700, exist_ok=True)
    check_private(directory)


def check_private(directory: Path) -> None:
    """Raise PermissionError if users other than this one and root can write to `directory`.

    It is refused rather than repaired: what others put there is unknown, and they may need the directory. Root,
    often alone in a container with a directory of the host, may use directories that others own.
    """
    status, user = os.stat(directory), os.geteuid()
    if user != 0 and status.st_uid not in (user, 0):
        raise PermissionError(f"{directory} belongs to another user ({status.st_uid}): give one of your own.")
    mode = stat.S_IMODE(status.st_mode)
    if mode & _WRITABLE_BY_OTHERS:
        raise PermissionError(
            f"{directory} has mode {mode:04o}: other users can replace what lies in it; "
            f"`chmod go-w {directory}`, or give a directory in it that does not exist yet."
        )


def close_to_others(fd: int) -> None:
    """Remove the permissions of group and others from an open file."""
    mode = stat.S_IMODE(os.fstat(fd).st_mode)
    if mode & (stat.S_IRWXG | stat.S_IRWXO):
        os.fchmod(fd, mode & stat.S_IRWXU)
