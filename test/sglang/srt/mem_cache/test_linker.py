"""How the linker opens the disk tier when the server starts."""

from __future__ import annotations

import errno
import sqlite3
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from sglang.srt.mem_cache.cached_attention import linker
from sglang.srt.mem_cache.cached_attention.linker import CachedAttentionLinker


def open_directory(directory: Path, error: Exception, monkeypatch: pytest.MonkeyPatch) -> Any:
    """What the linker opens if the disk tier raises `error`."""

    def fail(*_: Any, **__: Any) -> None:
        raise error

    monkeypatch.setattr(linker, "DiskTier", fail)
    config = SimpleNamespace(disk_path=str(directory), ttl=0)
    rank: Any = SimpleNamespace(_config=config, _read_key=lambda: None)
    identity: Any = SimpleNamespace(fingerprint=lambda: None)
    return CachedAttentionLinker._open_directory(rank, "dp0-pp0-tp0", identity, 1 << 20)


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.EROFS, "Read-only file system"),
        OSError(errno.EIO, "Input/output error"),
        OSError(errno.ENOSPC, "No space left on device"),
        sqlite3.OperationalError("disk I/O error"),
    ],
)
def test_a_disk_that_fails_does_not_keep_the_server_from_starting(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, error: Exception
) -> None:
    assert open_directory(tmp_path, error, monkeypatch) is None
    assert f"no disk tier until the next flush of the cache: {error}" in caplog.text


def test_a_badly_chosen_directory_stops_the_server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(PermissionError, match="other users"):
        open_directory(tmp_path, PermissionError("other users can replace what lies in it"), monkeypatch)
