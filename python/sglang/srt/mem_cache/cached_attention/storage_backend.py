"""The disk tier, attached and detached while the server runs, through SGLang's endpoint for storage backends."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from sglang.srt.managers.io_struct import AttachHiCacheStorageReqOutput, DetachHiCacheStorageReqOutput

from cached_attention.config import ConfigError

from .ranks import all_agree
from .settings import disk_settings, encryption_key

if TYPE_CHECKING:
    from sglang.srt.managers.io_struct import AttachHiCacheStorageReqInput
    from sglang.srt.managers.scheduler import Scheduler

    from .linker import CachedAttentionLinker
    from .radix_cache import CachedAttentionRadixCache

logger = logging.getLogger(__name__)

BACKEND = "disk"
EXPECTED = 'give {"path": DIRECTORY, "size": SIZE} as hicache_storage_backend_extra_config_json'


def attach(
    scheduler: Scheduler, cache: CachedAttentionRadixCache, request: AttachHiCacheStorageReqInput
) -> AttachHiCacheStorageReqOutput:
    """Empty the cache, and continue with a disk tier; on every rank, or on none."""
    linker, given = cache.cache_linker, list[tuple[str, int, str | None]]()
    wrong = _do_on_all_ranks(scheduler, lambda: given.append(_check(scheduler, linker, request)))
    if wrong is None:
        linker.attach_disk(*given[0])
        wrong = _do_on_all_ranks(scheduler, lambda: _open(scheduler, cache))
        if wrong is None:
            linker.announce()
        else:
            linker.detach_disk()
    message = "The cache was emptied." if wrong is None else wrong
    return AttachHiCacheStorageReqOutput(success=wrong is None, message=message)


def detach(cache: CachedAttentionRadixCache) -> DetachHiCacheStorageReqOutput:
    """Continue without the disk tier, which keeps its pages."""
    cache.cache_linker.detach_disk()
    logger.info("CachedAttention: the disk tier was detached.")
    return DetachHiCacheStorageReqOutput(success=True, message="Its pages stay in the directory.")


def _do_on_all_ranks(scheduler: Scheduler, step: Callable[[], None]) -> str | None:
    """What is wrong with the step on this rank or another one; None: nothing."""
    wrong = None
    try:
        step()
    except ConfigError as error:
        logger.warning("CachedAttention: no disk tier was attached: %s", error)
        wrong = str(error)
    except Exception as error:
        logger.exception("CachedAttention: no disk tier was attached.")
        wrong = f"{type(error).__name__}: {error}"
    if all_agree(wrong is None, scheduler.world_group):
        return None
    return wrong or "Another rank could not do it; its log says why."


def _check(
    scheduler: Scheduler, linker: CachedAttentionLinker, request: AttachHiCacheStorageReqInput
) -> tuple[str, int, str | None]:
    """Directory, bytes, and the place of a key in the environment."""
    if linker.only_saves:
        raise ConfigError("This server decodes for others and loads nothing: attach disks to those that prefill.")
    if linker.disk_path is not None:
        raise ConfigError(f"The disk tier at {linker.disk_path} is attached: detach it first.")
    if not scheduler.is_fully_idle():
        raise ConfigError("Requests run or wait: try again when there are none.")
    if not linker.weights_are_here:
        raise ConfigError("The weights are not on the device: resume the memory occupation first.")
    if request.hicache_storage_backend != BACKEND:
        raise ConfigError(
            f"hicache_storage_backend is {request.hicache_storage_backend!r}: give {BACKEND!r}. A remote store "
            "can be given at start only, with --cached-attention-remote."
        )
    path, size = disk_settings(**_settings(request.hicache_storage_backend_extra_config_json))
    return path, size, encryption_key(path, None)


def _settings(text: str | None) -> dict[str, str]:
    try:
        values: Any = json.loads(text or "")
    except ValueError:
        values = None
    is_object = isinstance(values, dict) and values.keys() == {"path", "size"}
    if not is_object or not all(isinstance(value, str) for value in values.values()):
        raise ConfigError(f"{text!r} is not what is expected: {EXPECTED}.")
    return values


def _open(scheduler: Scheduler, cache: CachedAttentionRadixCache) -> None:
    # What the device and host memory have was saved for no disk: the tree would not save it again.
    if not scheduler.flush_cache() or not cache.cache_linker.has_its_disk:
        raise ConfigError("The disk tier could not be opened; the log says why.")
