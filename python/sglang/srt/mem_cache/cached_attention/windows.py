"""Models with sliding-window layers, for which SGLang keeps only the window."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from sglang.srt.mem_cache.base_prefix_cache import InsertParams, InsertResult, MatchResult
from sglang.srt.mem_cache.cache_init_params import CacheInitParams
from sglang.srt.mem_cache.hicache_storage import PoolName, PoolTransfer
from sglang.srt.mem_cache.radix_cache import RadixKey
from sglang.srt.mem_cache.unified_cache.component_type import ComponentType

from cached_attention.chain import Chain, PageRun
from cached_attention.layout import DevicePool
from cached_attention.tiers.disk_ranks import WINDOWS

from .hybrid import HybridLinker, HybridTreeLink
from .layer_events import Layer, Several
from .linker import PathTransfer, page_keys
from .pools import refuse, window_pool
from .tree_link import RequestChain

if TYPE_CHECKING:
    from sglang.srt.managers.schedule_batch import Req
    from sglang.srt.mem_cache.unified_cache.unified_tree_core_interface import NodeId

LEAST_CHAIN = 16
"""Minimum chain length in pages: a window is kept with up to this many pages before it."""


class WindowsLinker(HybridLinker):
    """The trailing store holds the KV of the layers with windows, page by page. A prefix needs its last pages."""

    what = WINDOWS
    pool_name = PoolName.SWA
    immovable = "some of its layers keep a sliding window only"

    def _trailing_pool(self, params: CacheInitParams) -> DevicePool:
        # As SGLang's tree counts them: a draft model may read further back.
        self.span = -(-(params.swa_retain_window or 1) // params.page_size)
        self.chain_pages = max(LEAST_CHAIN, self.span)
        return window_pool(params)

    def _order_layers(self) -> int:
        mapping = self._kv_cache.layers_mapping
        if max(mapping) >= len(mapping):
            refuse("some of its layers have neither full attention nor a window")
        self._numbers = [mapping[layer] for layer in range(len(mapping))]
        return len(mapping)

    def _hand_out(self, batch: int, layers: Sequence[Layer]) -> None:
        """Each layer waits for what it reads.

        Which forward used a slot of windows last is not tracked, so the load waits for all forwards.
        """
        windows = self.store.start_tail_load(batch, self.record_offload_ready()).layers
        of_model = [(windows if is_window else layers)[number] for number, is_window in self._numbers]
        # A graph of the whole prefill waits only for the last layer.
        self.layer_done_counter.add(batch, [*of_model[:-1], Several(layers[-1], windows[-1])])

    def _trailing_run(self, kv: PoolTransfer | None, trailing: PoolTransfer) -> PageRun:
        """The last pages of the node, or those of a `PathTransfer`, which knows its place in the prompt."""
        if isinstance(trailing, PathTransfer):
            return self.page_run(trailing)
        assert kv is not None, "windows do not say where in their prompt they belong"
        path = [*(kv.prefix_hashes if isinstance(kv, PathTransfer) else []), *kv.keys]
        before = path[: len(path) - len(trailing.keys)]
        parent = bytes.fromhex(before[-1]) if before else None
        return PageRun(parent, len(before), page_keys(trailing.keys), trailing.device_indices)


class WindowsTreeLink(HybridTreeLink):
    """A prefix can be restored only up to a page where the window before it was saved."""

    cache_linker: WindowsLinker

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self._saved_tokens = 0
        """Tokens whose windows were saved with their KV during the current insert."""

    def match(self, key: RadixKey, req: Req, result: MatchResult) -> MatchResult:
        result = super().match(key, req, result)
        # So that this prompt leaves a window there.
        parting = max(result.swa_branching_seqlen or 0, self._parting * self.cache.page_size)
        result = result._replace(swa_branching_seqlen=parting or None)
        if (hit := self.hit_markers.get(req.rid)) is None:
            return result
        tokens = min(len(hit.tail_hashes), self.cache_linker.span) * self.cache.page_size
        return result._replace(swa_host_hit_length=max(result.swa_host_hit_length, tokens))

    @contextmanager
    def inserting(self, params: InsertParams) -> Iterator[None]:
        params.track_adopted_ranges = True
        self._saved_tokens = 0
        with super().inserting(params):
            yield

    def _offload_node(self, node_id: NodeId, transfers: list[PoolTransfer]) -> None:
        super()._offload_node(node_id, transfers)
        self._saved_tokens += sum(len(windows.device_indices) for windows in transfers[1:])

    def inserted(self, params: InsertParams, result: InsertResult) -> None:
        """Save windows that nodes received after their KV: recomputed, because they were in no tier any more.

        Decided by the tree, on which all ranks agree; the store skips pages that it already has.
        """
        node, page_size = result.last_device_node, self.cache.page_size
        if not (adopted := (result.adopted_ranges or {}).get(ComponentType.SWA)):
            return
        start, end = adopted[-1]
        first = -(-max(start, end - self.cache_linker.span * page_size) // page_size)
        if end - first * page_size <= self._saved_tokens:
            return
        slots = self.cache.path_device_indices(node)
        if end == len(slots):
            hashes = self._hashes_to(node, params.key)
            allocator = self.cache.token_to_kv_pool_allocator
            windows = allocator.translate_loc_from_full_to_swa(slots[first * page_size :]).to(torch.int64)
            own, before = hashes[first : end // page_size], hashes[:first]
            self._offload_trailing(node, PathTransfer(PoolName.SWA, None, windows, own, prefix_hashes=before))

    def _hashes_to(self, node: NodeId, key: RadixKey) -> list[str]:
        """Hashes of the pages of `key`, which ends with `node`."""
        known = RequestChain(list(self.cache.tree_core.get_prefix_hash_values(node)), Chain())
        key, _ = key.maybe_to_bigram_view(self.cache.tree_core.is_eagle)
        known.extend(key, self.cache.page_size)
        return known.hashes
