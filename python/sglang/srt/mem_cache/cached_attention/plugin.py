"""Entry point of group `sglang.srt.plugins`: runs in every SGLang process, costs nothing without the flag."""

from __future__ import annotations

import argparse
import logging
import sys
import time
from collections.abc import Callable, Sequence
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

import psutil
from sglang.srt.plugins.hook_registry import HookRegistry, HookType

from cached_attention.config import ConfigError

from . import flags, settings

if TYPE_CHECKING:
    from sglang.srt.managers.schedule_batch import Req
    from sglang.srt.mem_cache.registry import TreeCacheBuildContext
    from sglang.srt.server_args import ServerArgs

    from .radix_cache import CachedAttentionRadixCache

logger = logging.getLogger(__name__)

SUPPORTED_SGLANG = "0.5.23"
TOKENIZER_MANAGER = "sglang.srt.managers.tokenizer_manager.TokenizerManager"
SHUTDOWN_SECONDS = 15.0
"""Time that SGLang's own server gives its schedulers to end."""


def activate() -> None:
    """Register our hooks.

    Raises:
        ImportError: this is not the version of SGLang that the hooks were written for. SGLang logs it and
            continues without us; the flags are then unknown, so a server that was given them does not start.
    """
    found = version("sglang")
    if found.partition("+")[0] != SUPPORTED_SGLANG:  # What follows a "+" says how it was built.
        raise ImportError(
            f"sglang-cached-attention supports sglang {SUPPORTED_SGLANG}, but {found} is installed: "
            f"pip install sglang=={SUPPORTED_SGLANG}"
        )
    register = HookRegistry.register
    register("sglang.srt.server_args.ServerArgs.add_cli_args", _add_cli_args, HookType.AFTER)
    register("sglang.srt.server_args.ServerArgs.from_cli_args", _from_cli_args, HookType.AROUND)
    _accept_engine_arguments()
    if "sglang.srt.managers.io_struct" in sys.modules:
        from .hints import let_hints_pass

        let_hints_pass()
    # Hooks import what they hook: a process without a scheduler should not pay for that.
    if "sglang.srt.managers.scheduler" in sys.modules:
        from .weights import register_hooks

        for hook_type, hooks in _hooks_of_a_scheduler().items():
            for target, hook in hooks.items():
                register(f"sglang.srt.{target}", hook, hook_type)
        register_hooks()


def _hooks_of_a_scheduler() -> dict[HookType, dict[str, Callable[..., Any]]]:
    """By target, below `sglang.srt`."""
    scheduler = "managers.scheduler.Scheduler"
    streamer = "managers.scheduler_components.output_streamer.SchedulerOutputStreamer"
    results = "managers.scheduler_components.batch_result_processor.SchedulerBatchResultProcessor"
    prefill = "disaggregation.prefill.SchedulerDisaggregationPrefillMixin"
    decode = "disaggregation.decode.SchedulerDisaggregationDecodeMixin"
    return {
        HookType.BEFORE: {
            "managers.tp_worker.BaseTpWorker.forward_batch_embedding": _wait_for_loads,
            f"{decode}.process_decode_queue": _poll,
        },
        HookType.AROUND: {
            "mem_cache.registry.create_unified_radix_cache": _create_radix_cache,
            "mem_cache.kv_cache_configurator._should_elide_dsa_index_k": _spare_indexers,
            f"{scheduler}._prefetch_kvcache": _announce,
            "managers.schedule_policy.PrefillAdder.preempt_to_schedule": _preempt,
            f"{streamer}._get_storage_backend_type": _storage_backend,
            f"{scheduler}.clear_hicache_storage_wrapped": _clear_storage,
            f"{scheduler}.attach_hicache_storage_wrapped": _attach_storage,
            f"{scheduler}.detach_hicache_storage_wrapped": _detach_storage,
        },
        HookType.AFTER: {
            f"{scheduler}.__init__": _equip,
            f"{scheduler}._create_generation_req": _truncate,
            f"{scheduler}.get_internal_state": _add_store_state,
            "managers.schedule_policy.SchedulePolicy.calc_priority": _order_known,
            f"{results}.process_batch_result_prefill": _prefill_ended,
            f"{prefill}.process_batch_result_disagg_prefill": _prefill_ended,
        },
    }


def _add_cli_args(_result: None, parser: argparse.ArgumentParser) -> None:
    flags.add_cli_args(parser)


def _from_cli_args(
    original: Callable[..., ServerArgs], cls: type[ServerArgs], args: argparse.Namespace
) -> ServerArgs:
    try:
        settings.fold(vars(args))
    except ConfigError as error:
        sys.exit(f"error: {error}")
    if flags.is_enabled(vars(args).get("unified_cache_external_linker_config")):
        if args.disaggregation_mode != "decode":  # Such a server looks nothing up.
            HookRegistry.register(f"{TOKENIZER_MANAGER}.__init__", _serve_hints, HookType.AFTER)
        _leave_prompts_whole()
        _prepare_arguments()
    return original(cls, args)


def _leave_prompts_whole() -> None:
    """Hook the tokenizer process, so that it truncates nothing, once it is known to serve with the flag."""
    register, manager = HookRegistry.register, TOKENIZER_MANAGER
    register(f"{manager}._validate_one_request", _validate, HookType.AROUND)
    register(f"{manager}._wait_one_response", _tell_truncated, HookType.AFTER)
    register(f"{manager}.generate_request", _note_truncated, HookType.AFTER)
    openai = "sglang.srt.entrypoints.openai"
    chat = f"{openai}.serving_chat.OpenAIServingChat"
    completion = f"{openai}.serving_completions.OpenAIServingCompletion"
    for response in (f"{chat}._build_chat_response", f"{completion}._build_completion_response"):
        register(response, _tell_truncated_in_response, HookType.AFTER)
    for stream in (f"{chat}._generate_chat_stream", f"{completion}._generate_completion_stream"):
        register(stream, _tell_truncated_in_stream, HookType.AFTER)
    HookRegistry.apply_hooks()


def _prepare_arguments() -> None:
    """To be called before SGLang completes its arguments and reads `--lora-paths`."""
    adapter = "sglang.srt.lora.lora_registry.LoRARef.deterministic_id"
    HookRegistry.register(adapter, _adapter_id, HookType.AROUND)
    page_size = "sglang.srt.arg_groups.pipeline._page_size_default"
    HookRegistry.register(page_size, settings.default_page_size, HookType.AFTER)
    HookRegistry.apply_hooks()


def _adapter_id(original: Callable[[str, str], str], lora_name: str, lora_path: str) -> str:
    from .adapters import adapter_id

    return adapter_id(original, lora_name, lora_path)


def _validate(original: Callable[..., None], manager: Any, obj: Any, input_ids: list[int] | None) -> None:
    from .truncation import validate

    validate(original, manager, obj, input_ids)


def _tell_truncated(responses: Any, _manager: Any, obj: Any, *_args: Any, **_kwargs: Any) -> Any:
    from .truncation import tell

    return tell(responses, obj)


def _note_truncated(responses: Any, *_args: Any, **_kwargs: Any) -> Any:
    from .openai_responses import note_dropped

    return note_dropped(responses)


def _tell_truncated_in_response(response: Any, _serving: Any, request: Any, answers: Any, *_args: Any) -> Any:
    from .openai_responses import tell_in_response

    return tell_in_response(response, answers, request.n)


def _tell_truncated_in_stream(events: Any, _serving: Any, _adapted: Any, request: Any, *_args: Any) -> Any:
    from .openai_responses import tell_in_stream

    return tell_in_stream(events, request.n)


def _serve_hints(_result: None, manager: Any, *_args: Any, **_kwargs: Any) -> None:
    from .hints import serve_hints

    serve_hints(manager)


def _accept_engine_arguments() -> None:
    """Make `sgl.Engine` accept our arguments; it loads plugins just before it builds its ServerArgs."""
    module = sys.modules.get("sglang.srt.entrypoints.engine")
    if module is None:
        return
    server_args_class = module.Engine.server_args_class

    def build(**kwargs: Any) -> ServerArgs:
        settings.fold(kwargs)
        if flags.is_enabled(kwargs.get("unified_cache_external_linker_config")):
            _leave_prompts_whole()
            _prepare_arguments()
        return server_args_class(**kwargs)

    module.Engine.server_args_class = staticmethod(build)
    HookRegistry.register("sglang.srt.entrypoints.engine.Engine.shutdown", _let_flush, HookType.BEFORE)


def _let_flush(engine: Any) -> None:
    """Let the schedulers of an engine end by themselves and write dirty pages; `shutdown` kills the rest."""
    from sglang.srt.managers.io_struct import ShutdownReq
    from sglang.srt.utils.cudacore_pyspy_dump_utils import collect_scheduler_processes

    args, manager = engine.server_args, engine.tokenizer_manager
    if engine._attached or manager is None or not flags.has_disk(args.unified_cache_external_linker_config):
        return
    schedulers = collect_scheduler_processes()
    if not schedulers:
        return
    if manager._subprocess_watchdog is not None:
        manager._subprocess_watchdog.stop()
    manager._dispatch_to_scheduler(ShutdownReq())
    psutil.wait_procs(schedulers, timeout=SHUTDOWN_SECONDS)


def _create_radix_cache(original: Callable[..., Any], ctx: TreeCacheBuildContext, **kwargs: Any) -> Any:
    if not flags.is_enabled(ctx.server_args.unified_cache_external_linker_config):
        return original(ctx, **kwargs)
    from .radix_cache import CachedAttentionRadixCache

    cache = original(ctx, cache_class=CachedAttentionRadixCache)
    cache.open_store(ctx.tp_worker.model_runner.model, ctx.model_config.hf_config)
    return cache


def _spare_indexers(original: Callable[..., bool], *, is_draft_worker: bool) -> bool:
    """Whether layers that take another layer's selection need no memory for an indexer of their own.

    SGLang spares it except for linkers, whose pages it expects to be alike in all layers.
    """
    from sglang.srt.runtime_context import get_memory

    memory = get_memory()
    if not flags.is_enabled(memory.unified_cache_external_linker_config):
        return original(is_draft_worker=is_draft_worker)
    return not (memory.enable_hisparse or is_draft_worker)


def _ours(owner: Any) -> CachedAttentionRadixCache | None:
    """The tree of `owner`, if it is one with a store; these hooks also run in servers without the flag."""
    from .radix_cache import CachedAttentionRadixCache

    tree = owner.tree_cache
    return tree if isinstance(tree, CachedAttentionRadixCache) else None


def _equip(_result: None, scheduler: Any, *_args: Any, **_kwargs: Any) -> None:
    """Announce requests to the store when they arrive, and let them wait until their pages are in host memory.

    The scheduler announces arrivals, and calls `check_prefetch_progress`, only for caches with storage of their
    own; LMCache's flag for that is the one that implies nothing else.
    """
    from .hints import accept_hints
    from .reporting import Reporting
    from .truncation import truncation_of

    if (cache := _ours(scheduler)) is not None:
        cache.linker.truncation = truncation_of(scheduler, cache)
        scheduler.enable_lmcache = not cache.cache_linker.only_saves
        scheduler._request_dispatcher = accept_hints(scheduler._request_dispatcher, cache.take_hint)
        cache.watch(lambda: _waiting(scheduler))
        cache.reporting = Reporting(scheduler, cache.cache_linker)


def _poll(scheduler: Any) -> None:
    """A scheduler that decodes for others polls no linker."""
    if (cache := _ours(scheduler)) is not None:
        cache.check_hicache_events()


def _announce(original: Callable[..., Any], scheduler: Any, req: Req, *args: Any, **kwargs: Any) -> Any:
    """A streaming session keeps its KV on the device, outside of the tree, in which SGLang would look for it."""
    cache = _ours(scheduler)
    if cache is not None and cache.session.will_lend_record(req):
        return None
    return original(scheduler, req, *args, **kwargs)


def _preempt(original: Callable[..., bool], adder: Any, req: Req, *args: Any, **kwargs: Any) -> bool:
    """Nobody makes room for a request that still waits for its pages.

    True lets SGLang go on to find that out, and to look at the requests behind it.
    """
    cache = _ours(adder)
    if cache is not None and cache.keeps_waiting(req.cache_request_handle):
        return True
    return original(adder, req, *args, **kwargs)


def _waiting(scheduler: Any) -> Sequence[Req]:
    """The queued requests; on a prefill server also those that still wait for their decode server."""
    bootstrap = scheduler.disagg_prefill_bootstrap_queue
    return scheduler.waiting_queue if bootstrap is None else [*scheduler.waiting_queue, *bootstrap.queue]


def _truncate(req: Any, scheduler: Any, recv_req: Any, *_args: Any, **_kwargs: Any) -> None:
    if (cache := _ours(scheduler)) is not None and recv_req.mm_inputs is None:
        cache.linker.truncate(req)


def _order_known(_result: None, policy: Any, *_args: Any, **_kwargs: Any) -> None:
    if (cache := _ours(policy)) is not None:
        cache.queue_ordered()


def _wait_for_loads(worker: Any, batch: Any) -> None:
    """SGLang sets which loads a forward waits for, except for embedding and reward models."""
    from .layer_events import LayerEvents

    if isinstance(worker.hicache_layer_transfer_counter, LayerEvents):
        worker.set_hicache_consumer(batch.hicache_consumer_index)


def _prefill_ended(_result: None, processor: Any, batch: Any, *_args: Any) -> None:
    """`processor`: on a prefill server, the scheduler."""
    if (cache := _ours(processor)) is None:
        return
    cache.prompts_ran(batch.reqs)
    if batch.launch_ts and batch.extend_lens:
        cache.prefill_took(sum(batch.extend_lens), time.monotonic() - batch.launch_ts)


def _storage_backend(original: Callable[[Any], str], streamer: Any) -> str:
    """Name of the tiers below host memory in `cached_tokens_details`."""
    return original(streamer) if _ours(streamer) is None else "CachedAttention"


def _clear_storage(original: Callable[..., Any], scheduler: Any, recv_req: Any) -> Any:
    """It would answer that it has cleared something."""
    if _ours(scheduler) is None:
        return original(scheduler, recv_req)
    from sglang.srt.managers.io_struct import ClearHiCacheReqOutput

    logger.warning("CachedAttention: /hicache/storage-backend/clear clears nothing; use /flush_cache.")
    return ClearHiCacheReqOutput(success=False)


def _attach_storage(original: Callable[..., Any], scheduler: Any, recv_req: Any) -> Any:
    from .storage_backend import attach

    cache = _ours(scheduler)
    return original(scheduler, recv_req) if cache is None else attach(scheduler, cache, recv_req)


def _detach_storage(original: Callable[..., Any], scheduler: Any, recv_req: Any) -> Any:
    from .storage_backend import detach

    cache = _ours(scheduler)
    return original(scheduler, recv_req) if cache is None else detach(cache)


def _add_store_state(result: Any, scheduler: Any, *_args: Any) -> None:
    if (cache := _ours(scheduler)) is not None:
        result.internal_state["cached_attention"] = cache.describe_store()
