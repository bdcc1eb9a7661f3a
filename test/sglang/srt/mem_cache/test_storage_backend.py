"""Which requests to attach a disk tier are refused, and that no rank is left with one that others lack."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from sglang.srt.managers.io_struct import AttachHiCacheStorageReqInput
from sglang.srt.mem_cache.cached_attention import storage_backend
from sglang.srt.mem_cache.cached_attention.linker import CachedAttentionLinker
from sglang.srt.mem_cache.cached_attention.mla_dedup import MlaDedupLinker
from sglang.srt.mem_cache.cached_attention.states import StatesLinker
from sglang.srt.mem_cache.cached_attention.storage_backend import attach, detach


class Linker:
    only_saves = False
    disk_path: str | None = None
    has_its_disk = False
    weights_are_here = True
    announced = 0

    def announce(self) -> None:
        self.announced += 1

    def attach_disk(self, path: str, size: int, key: str | None) -> None:
        self.disk_path, self.size, self.key = path, size, key

    def detach_disk(self) -> None:
        self.disk_path = None


class Server:
    """One rank; `disk`: what opens at the flush, if anything."""

    def __init__(self, disk: object | None, idle: bool = True) -> None:
        self.linker, self.flushes, self._idle = Linker(), 0, idle
        self.cache: Any = SimpleNamespace(cache_linker=self.linker)
        self._disk = disk
        self.scheduler: Any = SimpleNamespace(
            is_fully_idle=lambda: idle, flush_cache=self._flush, world_group=SimpleNamespace(world_size=1)
        )

    def _flush(self) -> bool:
        self.flushes += 1
        self.linker.has_its_disk = self._disk is not None and self.linker.disk_path is not None
        return self._idle

    def attach(self, backend: str = "disk", **settings: Any) -> tuple[bool, str]:
        answer = attach(
            self.scheduler,
            self.cache,
            AttachHiCacheStorageReqInput(
                hicache_storage_backend=backend, hicache_storage_backend_extra_config_json=json.dumps(settings)
            ),
        )
        return answer.success, answer.message


def test_a_disk_is_attached_and_detached(tmp_path: Path) -> None:
    server = Server(disk=object())
    assert server.attach(path=str(tmp_path), size="1GB") == (True, "The cache was emptied.")
    assert (server.linker.disk_path, server.linker.size, server.flushes) == (str(tmp_path), 10**9, 1)
    assert server.linker.announced == 1
    done, message = server.attach(path=str(tmp_path / "other"), size="1GB")
    assert (done, message) == (False, f"The disk tier at {tmp_path} is attached: detach it first.")
    assert detach(server.cache).success
    assert server.linker.disk_path is None


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"backend": "file", "path": "/kv", "size": "1GB"}, "is 'file': give 'disk'"),
        ({"path": "/kv"}, 'give {"path": DIRECTORY, "size": SIZE}'),
        ({"path": "/kv", "size": "1GB", "mode": "fast"}, 'give {"path": DIRECTORY, "size": SIZE}'),
        ({"path": "/kv", "size": "900TB"}, "but only"),
        ({"path": __file__, "size": "1GB"}, "is not a directory"),
        ({"path": "", "size": "1GB"}, "is empty"),
        ({"path": None, "size": "1GB"}, 'give {"path": DIRECTORY, "size": SIZE}'),
        ({"path": "~nobody-at-all/kv", "size": "1GB"}, "home directory"),
    ],
)
def test_what_is_wrong_is_said_and_changes_nothing(given: dict[str, Any], message: str) -> None:
    server = Server(disk=object())
    done, answer = server.attach(**given)
    assert not done
    assert message in answer
    assert server.flushes == 0
    assert server.linker.disk_path is None


def test_an_unexpected_error_is_an_answer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It must neither end the scheduler nor leave the other ranks waiting for this one."""

    def fail(path: str, size: str) -> None:
        raise MemoryError("no memory")

    monkeypatch.setattr(storage_backend, "disk_settings", fail)
    assert Server(disk=object()).attach(path=str(tmp_path), size="1GB") == (False, "MemoryError: no memory")


def test_a_server_without_its_weights_gets_no_disk(tmp_path: Path) -> None:
    server = Server(disk=object())
    server.linker.weights_are_here = False
    done, message = server.attach(path=str(tmp_path), size="1GB")
    assert not done
    assert message.startswith("The weights are not on the device")
    assert server.flushes == 0


def test_only_an_idle_server_gets_a_disk(tmp_path: Path) -> None:
    server = Server(disk=object(), idle=False)
    assert server.attach(path=str(tmp_path), size="1GB") == (
        False,
        "Requests run or wait: try again when there are none.",
    )
    assert server.flushes == 0


def test_a_disk_that_does_not_open_is_not_configured_either(tmp_path: Path) -> None:
    server = Server(disk=None)
    done, message = server.attach(path=str(tmp_path), size="1GB")
    assert (done, message) == (False, "The disk tier could not be opened; the log says why.")
    assert server.linker.disk_path is None


def test_a_wrong_key_in_the_environment_is_refused_before_anything_is_emptied(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    server = Server(disk=object())
    monkeypatch.setenv("CACHED_ATTENTION_ENCRYPTION_KEY", "short")
    done, message = server.attach(path=str(tmp_path), size="1GB")
    assert (done, server.flushes, server.linker.disk_path) == (False, 0, None)
    assert "CACHED_ATTENTION_ENCRYPTION_KEY" in message
    monkeypatch.setenv("CACHED_ATTENTION_ENCRYPTION_KEY", "5a" * 32)
    assert server.attach(path=str(tmp_path), size="1GB")[0]
    assert server.linker.key == "environment"


def test_no_rank_has_a_disk_that_another_lacks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    server, answers = Server(disk=object()), iter([True, False])
    monkeypatch.setattr(storage_backend, "all_agree", lambda able, ranks: able and next(answers))
    done, message = server.attach(path=str(tmp_path), size="1GB")
    assert (done, message) == (False, "Another rank could not do it; its log says why.")
    assert server.linker.disk_path is None


@pytest.mark.parametrize(
    ("kind", "meant", "opened", "whole"),
    [
        (CachedAttentionLinker, {"host", "disk"}, (None, None), False),
        (CachedAttentionLinker, {"host", "disk"}, (1, None), True),
        (MlaDedupLinker, {"host"}, (None, None), True),  # Another rank keeps its pages.
        (StatesLinker, {"host", "disk"}, (1, None), False),
        (StatesLinker, {"host", "disk"}, (1, 1), True),
        (StatesLinker, {"host"}, (None, None), True),
    ],
)
def test_a_rank_has_its_disk_if_all_that_it_keeps_has_one(
    kind: type[CachedAttentionLinker],
    meant: set[str],
    opened: tuple[object, object],
    whole: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    linker: Any = object.__new__(kind)
    monkeypatch.setattr(kind, "configured_tiers", frozenset(meant))
    disk, trailing = opened
    linker.store = SimpleNamespace(disk=disk, trailing=SimpleNamespace(disk=trailing))
    assert linker.has_its_disk == whole


def test_a_server_that_decodes_for_others_takes_no_disk(tmp_path: Path) -> None:
    server = Server(disk=object())
    server.linker.only_saves = True
    done, message = server.attach(path=str(tmp_path), size="1GB")
    assert not done
    assert "attach disks to those that prefill" in message
    assert server.flushes == 0
