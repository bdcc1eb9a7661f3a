"""Hooks for changes of the weights, to which the pages on disk and in the remote store belong."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from sglang.srt.constants import GPU_MEMORY_ALL_TYPES, GPU_MEMORY_TYPE_KV_CACHE, GPU_MEMORY_TYPE_WEIGHTS
from sglang.srt.plugins.hook_registry import HookRegistry, HookType

if TYPE_CHECKING:
    from .linker import CachedAttentionLinker

UPDATER = "sglang.srt.managers.scheduler_components.weight_updater.SchedulerWeightUpdaterManager"
SOURCES = ("disk", "distributed", "tensor", "ipc")


def register_hooks() -> None:
    def after(method: str, hook: Any) -> None:
        HookRegistry.register(f"{UPDATER}.{method}", hook, HookType.AFTER)

    after("record_weight_version_after_update", _updated)
    after("begin_weight_update", _began)
    after("end_weight_update", _ended)
    for source in SOURCES:
        after(f"update_weights_from_{source}", _may_have_failed)
    HookRegistry.register(f"{UPDATER}.release_memory_occupation", _memory_leaves, HookType.BEFORE)
    after("resume_memory_occupation", _memory_is_back)


def _linker(updater: Any) -> CachedAttentionLinker | None:
    """None without a store: these hooks also run in servers without the flag."""
    from .radix_cache import CachedAttentionRadixCache

    tree = updater.scheduler.tree_cache
    return tree.cache_linker if isinstance(tree, CachedAttentionRadixCache) else None


def _updated(_result: None, updater: Any, *_args: Any) -> None:
    if (linker := _linker(updater)) is not None:
        linker.weights_changed()


def _began(result: Any, updater: Any, *_args: Any) -> None:
    """From now on a trainer may write weights into this server's memory without telling it."""
    if result.success and (linker := _linker(updater)) is not None:
        linker.weights_changed()


def _ended(result: Any, updater: Any, *_args: Any) -> None:
    """The end of an update repacks quantised weights, perhaps after the cache was flushed for the last time."""
    if result.success and (linker := _linker(updater)) is not None:
        linker.check_weights()


def _may_have_failed(result: Any, updater: Any, *_args: Any) -> None:
    """An update that failed may have changed some of the weights."""
    if not result.success and (linker := _linker(updater)) is not None:
        linker.weights_changed()


def _memory_leaves(updater: Any, recv_req: Any) -> None:
    """The device memory of KV, weights or both will be unmapped, even while pages of it are being saved."""
    if (linker := _linker(updater)) is None:
        return
    linker.store.wait_for_device()
    if GPU_MEMORY_TYPE_WEIGHTS in (recv_req.tags or GPU_MEMORY_ALL_TYPES):
        linker.weights_left()


def _memory_is_back(_result: Any, updater: Any, recv_req: Any) -> None:
    tags = recv_req.tags or GPU_MEMORY_ALL_TYPES
    if GPU_MEMORY_TYPE_WEIGHTS not in tags or (linker := _linker(updater)) is None:
        return
    linker.weights_are_back()
    if GPU_MEMORY_TYPE_KV_CACHE in tags:
        # The server wakes up at once, with the weights it had or those it is about to get: open what fits them.
        updater.flush_cache()
