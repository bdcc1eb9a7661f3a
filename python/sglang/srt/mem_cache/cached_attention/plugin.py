"""Entry point of group `sglang.srt.plugins`: runs in every SGLang process, costs nothing without the flag."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

from sglang.srt.plugins.hook_registry import HookRegistry, HookType

from cached_attention.config import ConfigError

from . import flags

if TYPE_CHECKING:
    from sglang.srt.mem_cache.registry import TreeCacheBuildContext
    from sglang.srt.server_args import ServerArgs

SUPPORTED_SGLANG = "0.5.23"


def activate() -> None:
    """Register our hooks.

    Raises:
        ImportError: this SGLang is not the one that the hooks were written for. SGLang logs it and goes
            on without us; the flags are then unknown, so a server that was given them does not start.
    """
    found = version("sglang")
    if found != SUPPORTED_SGLANG:
        raise ImportError(
            f"sglang-cached-attention supports sglang {SUPPORTED_SGLANG}, but {found} is installed: "
            f"pip install sglang=={SUPPORTED_SGLANG}"
        )
    register = HookRegistry.register
    register("sglang.srt.server_args.ServerArgs.add_cli_args", _add_cli_args, HookType.AFTER)
    register("sglang.srt.server_args.ServerArgs.from_cli_args", _from_cli_args, HookType.AROUND)
    _accept_engine_arguments()
    # Hooks import what they hook: a process without a scheduler shall not pay for ours.
    if "sglang.srt.managers.scheduler" in sys.modules:
        cache = "sglang.srt.mem_cache.registry.create_unified_radix_cache"
        register(cache, _create_radix_cache, HookType.AROUND)
        state = "sglang.srt.managers.scheduler.Scheduler.get_internal_state"
        register(state, _add_store_state, HookType.AFTER)
        register("sglang.srt.managers.scheduler.Scheduler.__init__", _hold_while_fetching, HookType.AFTER)


def _add_cli_args(_result: None, parser: argparse.ArgumentParser) -> None:
    flags.add_cli_args(parser)


def _from_cli_args(
    original: Callable[..., ServerArgs], cls: type[ServerArgs], args: argparse.Namespace
) -> ServerArgs:
    try:
        flags.fold(vars(args))
    except ConfigError as error:
        sys.exit(f"error: {error}")
    return original(cls, args)


def _accept_engine_arguments() -> None:
    """Make `sgl.Engine` take our arguments; it loads plugins just before it builds its ServerArgs."""
    module = sys.modules.get("sglang.srt.entrypoints.engine")
    if module is None:
        return
    server_args_class = module.Engine.server_args_class

    def build(**kwargs: Any) -> ServerArgs:
        flags.fold(kwargs)
        return server_args_class(**kwargs)

    module.Engine.server_args_class = staticmethod(build)


def _create_radix_cache(original: Callable[..., Any], ctx: TreeCacheBuildContext, **kwargs: Any) -> Any:
    if not flags.is_enabled(ctx.server_args.unified_cache_external_linker_config):
        return original(ctx, **kwargs)
    from .radix_cache import CachedAttentionRadixCache

    cache = original(ctx, cache_class=CachedAttentionRadixCache)
    cache.open_store(ctx.tp_worker.model_runner.model, ctx.model_config.hf_config)
    return cache


def _hold_while_fetching(_result: None, scheduler: Any, *_args: Any, **_kwargs: Any) -> None:
    """Let requests wait in the queue until their pages are in host memory.

    The scheduler asks `check_prefetch_progress` only of caches with storage of their own; LMCache's way
    of saying so is the one that implies nothing else.
    """
    from .radix_cache import CachedAttentionRadixCache

    if isinstance(scheduler.tree_cache, CachedAttentionRadixCache) and scheduler.tree_cache.has_disk:
        scheduler.enable_lmcache = True


def _add_store_state(result: Any, scheduler: Any, *_args: Any) -> None:
    from .radix_cache import CachedAttentionRadixCache

    if isinstance(scheduler.tree_cache, CachedAttentionRadixCache):
        result.internal_state["cached_attention"] = scheduler.tree_cache.describe_store()
