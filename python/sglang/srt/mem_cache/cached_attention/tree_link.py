"""What happens between the radix tree and the linker: match, load back, save."""

from __future__ import annotations

import time
from array import array
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, NamedTuple
from weakref import WeakKeyDictionary

import torch
from sglang.srt.mem_cache.base_prefix_cache import InsertParams, InsertResult, MatchResult
from sglang.srt.mem_cache.hicache_storage import PoolName, PoolTransfer
from sglang.srt.mem_cache.radix_cache import RadixKey
from sglang.srt.mem_cache.unified_cache.unified_cache_linker import (
    ExternalCacheHitMarker,
    UnifiedCacheLinkerWrapper,
)
from sglang.srt.mem_cache.utils import get_storage_hash_str

from cached_attention.chain import Chain
from cached_attention.conversations import Conversations
from cached_attention.index import KEY_BYTES
from cached_attention.store import CachedAttentionStore

from .hints import HintReqInput, Outlook
from .linker import CachedAttentionLinker, PathTransfer, page_keys
from .ranks import Ranks

if TYPE_CHECKING:
    from sglang.srt.managers.schedule_batch import Req
    from sglang.srt.mem_cache.unified_cache.unified_tree_core_interface import NodeId
    from sglang.srt.mem_cache.unified_radix_cache import UnifiedRadixCache

    from .kv_events import KvEvents
    from .truncation import TruncatedPrompt, Truncation


REMEMBERED = 65_536
"""Number of requests whose conversations a hint can name, at up to 500 bytes each."""
BACK = (1, 2, 3, 5, 9, 17, 33, 65, 129)
"""Pages from the end by which a conversation can be found: its tail is evicted first."""


class RequestChain(NamedTuple):
    """The page hashes of a request, kept for as long as SGLang keeps the request."""

    hashes: list[str]
    chain: Chain

    def extend(self, key: RadixKey, page_size: int) -> None:
        """Hash the pages of `key` that were not hashed before."""
        known, pages = len(self.hashes), len(key) // page_size
        if known >= pages:
            return
        last = self.hashes[-1] if self.hashes else None
        tail = get_storage_hash_str(key[known * page_size : pages * page_size], last, page_size=page_size)
        self.hashes.extend(tail)
        self.chain.keys.extend(page_keys(tail))


class TreeLink(UnifiedCacheLinkerWrapper):
    """Upstream's wrapper with a memo of hashes per request, and saves that know their place in the chain."""

    cache_linker: CachedAttentionLinker
    truncation: Truncation | None = None
    """Truncates over-long prompts; None leaves them to SGLang."""

    def __init__(self, cache: UnifiedRadixCache, cache_linker: CachedAttentionLinker) -> None:
        super().__init__(cache, cache_linker)
        self._chains: WeakKeyDictionary[Req, RequestChain] = WeakKeyDictionary()
        self._truncated: WeakKeyDictionary[Req, TruncatedPrompt] = WeakKeyDictionary()
        self.ranks = Ranks(self._is_ready_here, None if cache.tp_world_size == 1 else self._take_least)
        self._inserted: RadixKey | None = None
        self._ends: OrderedDict[str, bytes] = OrderedDict()
        """Per request that ended recently: keys of pages at the end of its conversation, the last first."""
        self.conversations = Conversations(time.monotonic)

    @property
    def store(self) -> CachedAttentionStore:
        """Not there before the linker is opened."""
        return self.cache_linker.store

    @property
    def events(self) -> KvEvents | None:
        return self.cache_linker.events

    @contextmanager
    def inserting(self, params: InsertParams) -> Iterator[None]:
        """Context in which all saves are of pages of the prompt that is being inserted."""
        self._inserted = params.key
        try:
            yield
        finally:
            self._inserted = None

    def checkpoints(self, req: Req) -> None:
        """What is inserted next is of `req`."""

    def inserted(self, params: InsertParams, result: InsertResult) -> None:
        """A prompt was inserted."""

    def _is_ready_here(self, rid: str, may_give_up: bool) -> bool:
        return self.store.is_ready(rid, may_give_up)

    def _take_least(self, numbers: torch.Tensor) -> None:
        self.cache._all_reduce_attn_groups(numbers, torch.distributed.ReduceOp.MIN)

    def truncate(self, req: Req) -> None:
        """Truncate the prompt of a new request if it is too long."""
        if self.truncation is not None and (prompt := self.truncation.cut_request(req)) is not None:
            self._truncated[req] = prompt
            self.store.stats.truncated(prompt.dropped)

    def match(self, key: RadixKey, req: Req, result: MatchResult) -> MatchResult:
        """Add to `result` the pages that the store holds beyond those on the device."""
        self.hit_markers.pop(req.rid, None)
        key, _ = key.maybe_to_bigram_view(self.cache.tree_core.is_eagle)
        page_size = self.cache.page_size
        on_device, in_prompt = result.device_prefix_len // page_size, len(key) // page_size
        chain = self._chain(key, req)
        if self.events is not None:
            self.events.learn(chain.keys, key)
        self.store.left_device(chain.keys[on_device:])
        if (prompt := self._truncated.pop(req, None)) is not None:
            self.store.alias(chain, prompt.sources(len(chain.keys)))
            self.store.await_saves(req.rid, chain.keys[on_device:])
        self._arrive(req.rid, chain, on_device)
        # Even if all of it is on the device: the conversation is in use, so its copy must not age.
        restorable = self.cache_linker.reserve(req.rid, chain)
        if on_device >= in_prompt:
            return result
        pages = self._agree(req, chain, min(restorable, in_prompt), on_device)
        if pages <= on_device:
            return result
        tail = self._chains[req].hashes[on_device:pages]
        self.hit_markers[req.rid] = ExternalCacheHitMarker(tail, result.device_prefix_len)
        return result._replace(
            last_host_node=result.best_match_node, host_hit_length=(pages - on_device) * page_size
        )

    def _arrive(self, rid: str, chain: Chain, on_device: int) -> None:
        self.store.arrive(rid, chain, on_device=on_device)

    def decide_again(self, rids: Sequence[str]) -> None:
        """Decide what the queued requests need of which pages were found or lost since they arrived."""

    def _agree(self, req: Req, chain: Chain, pages: int, on_device: int) -> int:
        """Pages that every rank can restore; this one has `pages`. Results up to `on_device` do not matter."""
        return self.ranks.agree(pages)

    def _chain(self, key: RadixKey, req: Req) -> Chain:
        known = self._chains.setdefault(req, RequestChain([], Chain()))
        known.extend(key, self.cache.page_size)
        return known.chain

    def finished(self, req: Req) -> None:
        """Remember where the conversation of `req` ends, so that a hint can name it by `req.rid`."""
        if (known := self._chains.get(req)) is None:
            return
        tokens = array("q", [*req.origin_input_ids, *req.output_ids[:-1]])
        known.extend(self._key(tokens, req.extra_key, req.cache_salt), self.cache.page_size)
        if known.chain.keys:
            self._ends[req.rid] = b"".join(
                known.chain.keys[-back] for back in BACK if back <= len(known.chain.keys)
            )
            self._ends.move_to_end(req.rid)
            if req.finished():
                self.conversations.turn_ended(known.chain.keys, req.cached_tokens)
        if len(self._ends) > REMEMBERED:
            self._ends.popitem(last=False)

    def _key(self, tokens: array[int], extra_key: str | None, cache_salt: str | None) -> RadixKey:
        """The tree's key of `tokens`: with EAGLE, each token is paired with the one after it."""
        return RadixKey(tokens, extra_key, is_bigram=self.cache.tree_core.is_eagle, cache_salt=cache_salt)

    def hottest(self, count: int) -> list[dict[str, Any]]:
        """The conversations that were continued most, with their turns, tokens and tiers."""
        store = self.store
        return [
            {
                "conversation": known.name,
                "turns": known.turns,
                "tokens": known.pages * self.cache.page_size,
                "reused_tokens": known.reused_tokens,
                "idle_s": round(known.idle, 1),
                "tiers": store.tiers_with(known.last),
            }
            for known in self.conversations.hottest(count)
        ]

    def take_hint(self, hint: HintReqInput) -> None:
        store, chain = self.store, self._hinted(hint)
        if hint.outlook == Outlook.DROPPED:
            store.drop(chain)
        elif hint.outlook == Outlook.KEPT:
            store.keep(chain)
        else:
            store.expect(chain, hint.expect_in_s)

    def _hinted(self, hint: HintReqInput) -> Chain:
        if hint.conversation is not None:
            ends = self._ends.get(hint.conversation, b"")
            keys = (ends[start : start + KEY_BYTES] for start in range(0, len(ends), KEY_BYTES))
            return self.store.chain_to(*keys)
        known, tokens, extra_key = RequestChain([], Chain()), hint.input_ids or array("q"), hint.extra_key
        prompt = self.truncation.cut(tokens, extra_key, hint.cache_salt) if self.truncation else None
        if prompt is not None:
            tokens, extra_key = prompt.kept, prompt.extra_key
        key = self._key(tokens, extra_key, hint.cache_salt)
        known.extend(key, self.cache.page_size)
        if prompt is not None and hint.outlook != Outlook.DROPPED:
            if self.events is not None:
                self.events.learn(known.chain.keys, key)
            self.store.alias(known.chain, prompt.sources(len(known.chain.keys)))
        return known.chain

    def release_request(self, rid: str) -> None:
        super().release_request(rid)
        self.store.leave(rid)

    def offload_nodes(self, node_ids: Sequence[NodeId]) -> None:
        for node_id in node_ids:
            transfers = self.cache.tree_core.build_external_linker_offload_transfers(node_id)
            if transfers:
                kv, *others = transfers
                self._offload_node(node_id, [self._with_prefix(node_id, kv), *others])

    def _with_prefix(self, node_id: NodeId, transfer: PoolTransfer) -> PathTransfer:
        """The node's pages, or its whole path if the store has lost the pages before them."""
        prefix = self.cache.tree_core.get_prefix_hash_values(node_id)
        if self.events is not None and self._inserted is not None:
            self.events.learn(page_keys([*prefix, *(transfer.keys or [])]), self._inserted)
        path = PathTransfer(PoolName.KV, None, transfer.device_indices, transfer.keys, prefix_hashes=prefix)
        if self.cache_linker.lacks_parent(path):
            indices = self.cache.path_device_indices(node_id).to(torch.int64)
            return PathTransfer(PoolName.KV, None, indices, [*prefix, *(transfer.keys or [])])
        return path
