"""The directory given by the operator: one owner, one sub-directory per fingerprint."""

from __future__ import annotations

import fcntl
import json
import logging
import os
import re
import socket
import time
from contextlib import suppress
from pathlib import Path

from cached_attention.fingerprint import FORMAT_VERSION, Fingerprint
from cached_attention.permissions import close_to_others, make_private
from cached_attention.tiers.disk_files import FILE_NAME, PROBE_NAME
from cached_attention.tiers.disk_space import disk_usage

logger = logging.getLogger(__name__)

LOCK_NAME = "cached-attention.lock"
FINGERPRINT_NAME = "fingerprint.json"
INDEX_NAME = "index.sqlite3"
STORE_NAME = re.compile(r"[0-9a-f]{16}")
_OWN_NAMES = {PROBE_NAME, INDEX_NAME, *(INDEX_NAME + end for end in ("-wal", "-shm", "-journal"))}
_OWN_NAMES |= {FINGERPRINT_NAME, FINGERPRINT_NAME + ".new"}


BADLY_CHOSEN = (PermissionError, NotADirectoryError, FileExistsError)
"""Errors of a directory that cannot be used, rather than of its disk."""


class DirectoryInUseError(RuntimeError):
    """Another process owns the directory."""

    def __init__(self, directory: Path) -> None:
        super().__init__(
            f"{directory} is in use by {owner(directory) or 'another process'}: a directory has one owner at a "
            "time. Stop that process, or give this one another directory."
        )


class DirectoryLock:
    """Ownership of a directory, until `release` or the end of the process.

    The lock file stays: removing it would let two processes hold two locks of the same name.

    Args:
        shared: with all others that also share it.

    Raises:
        DirectoryInUseError: another process owns it.
        PermissionError: others can write to the directory.
        OSError: it cannot be created or written.
    """

    def __init__(self, directory: Path, *, shared: bool = False) -> None:
        make_private(directory)
        self._how = fcntl.LOCK_SH if shared else fcntl.LOCK_EX
        self._fd = _open_lock(directory)
        close_to_others(self._fd)
        if not self._acquire():
            os.close(self._fd)
            raise DirectoryInUseError(directory)
        with suppress(OSError):
            self._sign()

    def release(self) -> None:
        os.close(self._fd)

    def _acquire(self) -> bool:
        """Tries more than once, because `is_owned` holds the lock for a moment."""
        for pause in (0.05, 0.1, None):
            with suppress(BlockingIOError):
                fcntl.flock(self._fd, self._how | fcntl.LOCK_NB)
                return True
            if pause:
                time.sleep(pause)
        return False

    def _sign(self) -> None:
        """Write the owner into the lock file; the lock holds without it, e.g. on a full disk."""
        text = json.dumps({"pid": os.getpid(), "host": socket.gethostname(), "since": time.time()})
        os.ftruncate(self._fd, 0)
        os.pwrite(self._fd, text.encode(), 0)


def _open_lock(directory: Path) -> int:
    path, how = directory / LOCK_NAME, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW
    with suppress(FileExistsError):
        # As it is new, it cannot be a link to a file that the directory's owner must not get.
        fd = os.open(path, how | os.O_EXCL, 0o600)
        if os.geteuid() == 0:  # An operator's command; the server's user must be able to open it later.
            status = directory.stat()
            os.fchown(fd, status.st_uid, status.st_gid)
        return fd
    return os.open(path, how, 0o600)


def owner(directory: Path) -> str | None:
    """Description of the last owner; None if there was none. Only the lock tells whether it still runs."""
    try:
        values = json.loads((directory / LOCK_NAME).read_bytes())
        since = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(values["since"]))
        return f"process {values['pid']} on {values['host']} (since {since})"
    except (OSError, ValueError, KeyError, TypeError):
        return None


def is_owned(directory: Path) -> bool:
    """Whether a process owns the directory now."""
    try:
        fd = os.open(directory / LOCK_NAME, os.O_RDONLY | os.O_CLOEXEC)
    except FileNotFoundError:
        return False
    try:
        fcntl.flock(fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    finally:
        os.close(fd)
    return False


def make_store(directory: Path, fingerprint: Fingerprint) -> Path:
    """Sub-directory for `fingerprint`, created if new."""
    path = directory / fingerprint.name
    path.mkdir(mode=0o700, exist_ok=True)
    path.chmod(0o700)
    text = fingerprint.to_json().encode() + b"\n"
    named = path / FINGERPRINT_NAME
    with suppress(FileNotFoundError):
        if named.read_bytes() == text:
            named.chmod(0o600)
            return path
    new = path / (FINGERPRINT_NAME + ".new")
    fd = os.open(new, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    with os.fdopen(fd, "wb") as file:
        file.write(text)
        file.flush()
        os.fsync(fd)
    new.rename(named)
    return path


def read_fingerprint(store: Path) -> Fingerprint | None:
    """Fingerprint recorded in the store; None if it is damaged or of an unknown format."""
    with suppress(OSError, ValueError):
        fingerprint = Fingerprint.from_json((store / FINGERPRINT_NAME).read_bytes())
        if fingerprint.name == store.name and fingerprint.format_version == FORMAT_VERSION:
            return fingerprint
    return None


def stores(directory: Path) -> list[Path]:
    """Sub-directories that are stores, of any format, sorted by name."""
    found = (path for path in directory.iterdir() if STORE_NAME.fullmatch(path.name))
    return sorted(path for path in found if not path.is_symlink() and (path / FINGERPRINT_NAME).is_file())


def last_change(store: Path) -> float:
    """When the store was last written to, in seconds since the epoch; 0 if it has no files.

    Readers may leave an empty log and SQLite's shared memory, which do not count.
    """
    files = [path for path in store.iterdir() if path.is_file() and not path.name.endswith("-shm")]
    return max((status.st_mtime for status in map(Path.lstat, files) if status.st_size), default=0.0)


def remove_store(store: Path) -> int:
    """Remove a store's own files, and its directory if nothing else is in it; returns the bytes freed.

    The fingerprint is removed last, so that a half-removed store is still recognised as one.
    """
    before = disk_usage(store)
    own = [path for path in store.iterdir() if path.name in _OWN_NAMES or FILE_NAME.fullmatch(path.name)]
    for path in sorted(own, key=lambda path: path.name == FINGERPRINT_NAME):
        if path.is_dir() and not path.is_symlink():
            continue
        path.unlink(missing_ok=True)
    with suppress(OSError):
        store.rmdir()
    return before - disk_usage(store)
