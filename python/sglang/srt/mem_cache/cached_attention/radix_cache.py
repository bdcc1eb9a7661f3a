"""The radix cache of a server that runs with `--enable-cached-attention`."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary, WeakSet

import torch
from sglang.srt.constants import HEALTH_CHECK_RID_PREFIX
from sglang.srt.mem_cache.base_prefix_cache import (
    CacheRequestHandle,
    EvictParams,
    EvictResult,
    InsertParams,
    InsertResult,
    TreeLock,
)
from sglang.srt.mem_cache.unified_radix_cache import UnifiedRadixCache

from cached_attention.store import CachedAttentionStore

from .answers import AnswersLinker, AnswersTreeLink
from .linker import CachedAttentionLinker
from .states import StatesLinker, StatesTreeLink
from .tree_link import TreeLink
from .windows import WindowsLinker, WindowsTreeLink

if TYPE_CHECKING:
    from sglang.srt.managers.schedule_batch import Req

    from .hints import HintReqInput
    from .reporting import Reporting

LINKS: dict[type, type[TreeLink]] = {
    StatesLinker: StatesTreeLink,
    WindowsLinker: WindowsTreeLink,
    AnswersLinker: AnswersTreeLink,
}
CHECK_INVARIANTS = "CACHED_ATTENTION_CHECK_INVARIANTS"
"""Environment variable: if not empty, `/server_info` walks the whole store and reports damage. For tests."""
HOTTEST = 10
"""Number of conversations that `/server_info` lists."""


class CachedAttentionRadixCache(UnifiedRadixCache):
    """Upstream's tree on top of our store."""

    linker: TreeLink

    def init_cache_linker(self, cache_linker: CachedAttentionLinker) -> None:
        self.linker = LINKS.get(type(cache_linker), TreeLink)(self, cache_linker)
        self._counted: WeakSet[Req] = WeakSet()
        self._keep_waiting: set[str] = set()
        self._remote_pages: WeakKeyDictionary[CacheRequestHandle, Sequence[int]] = WeakKeyDictionary()
        """Per admitted request: places in its chain of the pages from the remote store."""

    reporting: Reporting | None = None
    _queue: Callable[[], Sequence[Req]] = staticmethod(tuple)

    def watch(self, queue: Callable[[], Sequence[Req]]) -> None:
        """`queue` yields the scheduler's waiting requests in the order in which they will run."""
        self._queue = queue

    @property
    def cache_linker(self) -> CachedAttentionLinker:
        return self.linker.cache_linker

    @property
    def store(self) -> CachedAttentionStore:
        """Not there before `open_store`."""
        return self.cache_linker.store

    def open_store(self, model: torch.nn.Module, hf_config: Any) -> None:
        self.cache_linker.open(model, hf_config)

    def check_prefetch_progress(self, handle: CacheRequestHandle) -> bool:
        return handle.rid not in self._keep_waiting and self.linker.ranks.is_ready(handle.rid)

    def keeps_waiting(self, handle: CacheRequestHandle) -> bool:
        """Whether a queued request waits for its pages until the end of this pass."""
        if not self.check_prefetch_progress(handle):
            self._keep_waiting.add(handle.rid)
        return handle.rid in self._keep_waiting

    def pop_prefetch_loaded_span(self, handle: CacheRequestHandle) -> tuple[int, int | None]:
        first, pages, remote_pages = self.store.fetched_span(handle.rid)
        if pages:
            self._remote_pages[handle] = remote_pages
        return pages * self.page_size, first * self.page_size if pages else None

    def has_pending_cache_operations(self) -> bool:
        # Nothing that the scheduler has to wait for: `reset` and `close` wait themselves.
        return False

    def on_release(self, req: Req, *, checkpointed: bool) -> None:
        super().on_release(req, checkpointed=checkpointed)
        self.linker.finished(req)
        self.store.ended(req.rid)

    def check_hicache_events(self) -> None:
        # The first call of a scheduling pass: release what the last pass matched but did not admit.
        self.store.end_pass()
        self._keep_waiting.clear()
        self._queue_known()
        super().check_hicache_events()
        if self.reporting is not None:
            self.reporting.poll()

    # What `LoadFence` watches.

    def lock(self, *node: Any, **options: Any) -> TreeLock | None:
        lock = super().lock(*node, **options)
        self.cache_linker.fence.locked(lock)
        return lock

    def unlock(self, lock: TreeLock | None) -> None:
        if lock is not None:
            self.cache_linker.fence.unlocked(lock)
        super().unlock(lock)

    def evict(self, params: EvictParams) -> EvictResult:
        with self.cache_linker.fence.evicting():
            return super().evict(params)

    def evict_for_alloc(self, params: EvictParams, **options: Any) -> EvictResult:
        with self.cache_linker.fence.evicting():
            return super().evict_for_alloc(params, **options)

    def finish_external_linker_loads(self, reqs: list[Req]) -> list[Req]:
        # The scheduler's last call after it has launched a forward.
        failed = super().finish_external_linker_loads(reqs)
        self.cache_linker.forward_launched()
        return failed

    def checkpoint_into_tree(self, req: Req, *, up_to: int, **options: Any) -> None:
        self.linker.checkpoints(req)
        super().checkpoint_into_tree(req, up_to=up_to, **options)

    def insert(self, params: InsertParams) -> InsertResult:
        self.cache_linker.fence.close()
        # The saves that this starts are of pages of this prompt.
        with self.linker.inserting(params):
            result = super().insert(params)
        self.linker.inserted(params, result)
        return result

    def take_events(self) -> list[Any]:
        """Events that SGLang publishes after this pass: the tree's for the device, then those of our tiers."""
        events = super().take_events()
        return events if self.linker.events is None else events + self.linker.events.take()

    def _queue_known(self) -> list[str]:
        rids = [req.rid for req in self._queue()]
        self.store.reorder(rids)
        return rids

    def queue_ordered(self) -> None:
        """The scheduler has sorted its queue and will walk it now."""
        rids = self._queue_known()
        self.linker.decide_again(rids)
        self.linker.ranks.agree_on_ready(rids)

    def prefill_took(self, tokens: int, seconds: float) -> None:
        self.store.prefill_took(tokens, seconds)

    def prompts_ran(self, reqs: Sequence[Req]) -> None:
        """Part of each prompt was computed. Each request counts once, with the hits that its response reports."""
        stats = self.store.stats
        for req in reqs:
            if req not in self._counted and not (req.rid or "").startswith(HEALTH_CHECK_RID_PREFIX):
                self._counted.add(req)
                stats.prompt_ran(len(req.origin_input_ids), self._hits(req))

    def _hits(self, req: Req) -> dict[str, int]:
        """Tokens of the prompt that were not computed, by tier; SGLang has one number for disk and remote."""
        below, first = req.cached_tokens_storage, req.storage_hit_start or 0
        places = self._remote_pages.pop(req.cache_request_handle, ())
        remote = sum(first <= place * self.page_size < first + below for place in places) * self.page_size
        return {
            "device": req.cached_tokens_device,
            "host": req.cached_tokens_host,
            "disk": below - remote,
            "remote": remote,
        }

    def take_hint(self, hint: HintReqInput) -> None:
        """A client's hint about a conversation, see `hints`."""
        self.linker.take_hint(hint)

    def supports_fast_match_prefix(self) -> bool:
        # A match also involves the store and other ranks: too costly for every queued request in every pass.
        return False

    def describe_store(self) -> dict[str, Any]:
        state = self.cache_linker.describe() | {"hottest": self.linker.hottest(HOTTEST)}
        if os.environ.get(CHECK_INVARIANTS):
            state |= {"saving": self.store.saving, "pins": self.store.pins, "damage": _damage(self.store)}
        return state


def _damage(store: CachedAttentionStore) -> str:
    try:
        store.check_invariants()
    except AssertionError as error:
        return str(error) or "an invariant does not hold"
    return ""
