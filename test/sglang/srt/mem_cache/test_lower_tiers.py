"""How the disk tier is opened when the server starts."""

from __future__ import annotations

import errno
import sqlite3
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from sglang.srt.mem_cache.cached_attention import lower_tiers
from sglang.srt.mem_cache.cached_attention.lower_tiers import LowerTiers


def open_directory(directory: Path, error: Exception, monkeypatch: pytest.MonkeyPatch) -> Any:
    """What is opened if the disk tier raises `error`."""

    def fail(*_: Any, **__: Any) -> None:
        raise error

    monkeypatch.setattr(lower_tiers, "DiskTier", fail)
    config: Any = SimpleNamespace(disk_path=str(directory), disk_size=1 << 20, ttl=0, encryption_key=None)
    identity: Any = SimpleNamespace(fingerprint=lambda: None)
    return LowerTiers(config, identity, "dp0-pp0-tp0", int).open_disk()


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
