"""What the tiers do when the weights change or leave the device."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
from sglang.srt.mem_cache.cached_attention import weights
from sglang.srt.mem_cache.cached_attention.layer_events import LayerEvents
from sglang.srt.mem_cache.cached_attention.linker import CachedAttentionLinker
from sglang.srt.mem_cache.cached_attention.lower_tiers import LowerTiers
from sglang.srt.mem_cache.cached_attention.radix_cache import CachedAttentionRadixCache

SUCCESS, FAILURE = SimpleNamespace(success=True), SimpleNamespace(success=False)


class Store:
    """Notes what happens to its tiers."""

    def __init__(self) -> None:
        self.log: list[str] = []
        self.disk: Any = object()
        self.remote = SimpleNamespace(
            pause=lambda: self.log.append("pause"), serve=lambda _: self.log.append("serve")
        )

    def detach_disk(self) -> None:
        self.disk = None
        self.log.append("detach")

    def reset(self) -> None:
        self.log.append("reset")

    def replace_disk(self, _open_disk: Any) -> None:
        self.disk = object()
        self.log.append("replace")

    def wait_for_device(self) -> None:
        self.log.append("wait")


class Model:
    """Cannot be read while it is not on the device."""

    is_here = True
    is_new = False

    def has_changed(self) -> bool:
        assert self.is_here
        return self.is_new

    def updated(self) -> None:
        pass

    def shared_fingerprint(self) -> None:
        assert self.is_here


class Server:
    def __init__(self) -> None:
        self.store, self.model = Store(), Model()
        self.linker: Any = object.__new__(CachedAttentionLinker)
        self.linker.store = self.store
        config: Any = SimpleNamespace(disk_path="/somewhere")
        model: Any = self.model
        self.linker._lower = [LowerTiers(config, model, ".", int)]
        self.linker.layer_done_counter = LayerEvents(1)
        cache = CachedAttentionRadixCache.__new__(CachedAttentionRadixCache)
        cache.linker = SimpleNamespace(cache_linker=self.linker)  # type: ignore[assignment]
        self.updater = SimpleNamespace(scheduler=SimpleNamespace(tree_cache=cache), flush_cache=self.linker.reset)

    def log(self) -> list[str]:
        log, self.store.log = self.store.log, []
        return log

    def leave(self, *tags: str) -> None:
        weights._memory_leaves(self.updater, SimpleNamespace(tags=list(tags)))
        self.model.is_here = bool(tags) and "weights" not in tags

    def come_back(self, *tags: str) -> None:
        self.model.is_here = True
        weights._memory_is_back(None, self.updater, SimpleNamespace(tags=list(tags)))


@pytest.mark.parametrize(
    ("hook", "result", "is_new", "leaves"),
    [
        (weights._began, SUCCESS, False, True),
        (weights._began, FAILURE, False, False),
        (weights._ended, SUCCESS, True, True),
        (weights._ended, SUCCESS, False, False),
        (weights._may_have_failed, FAILURE, False, True),
        (weights._may_have_failed, SUCCESS, True, False),
        (weights._updated, None, False, True),
    ],
)
def test_tiers_of_old_weights_are_left_alone(hook: Any, result: Any, is_new: bool, leaves: bool) -> None:
    server = Server()
    server.model.is_new = is_new
    hook(result, server.updater, None)
    assert server.log() == (["pause", "detach"] if leaves else [])
    server.linker.reset()
    assert server.log() == ["replace" if leaves or is_new else "reset", "serve"]


def test_weights_are_not_read_while_they_are_away() -> None:
    server = Server()
    server.leave("weights")
    assert server.log() == ["wait", "pause", "detach"]
    server.leave("kv_cache")
    server.linker.reset()
    assert server.log() == ["wait", "reset"]
    server.come_back("weights")
    server.come_back("kv_cache")
    assert server.log() == []
    server.linker.reset()
    assert server.log() == ["replace", "serve"]


def test_a_server_that_wakes_up_opens_its_tiers() -> None:
    server = Server()
    server.leave()
    server.linker.reset()
    server.log()
    server.come_back()
    assert server.log() == ["replace", "serve"]


def test_kv_is_not_unmapped_while_it_is_saved() -> None:
    server = Server()
    server.leave("kv_cache")
    assert server.log() == ["wait"]


def test_servers_without_the_flag_go_on_as_before() -> None:
    other: Any = SimpleNamespace(scheduler=SimpleNamespace(tree_cache=object()))
    weights._updated(None, other)
    weights._began(SUCCESS, other)
    weights._memory_leaves(other, SimpleNamespace(tags=None))
    weights._memory_is_back(None, other, SimpleNamespace(tags=None))
