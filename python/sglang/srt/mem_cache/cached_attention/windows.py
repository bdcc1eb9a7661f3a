"""Models with layers whose sliding window is all that SGLang keeps of them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from sglang.srt.mem_cache.base_prefix_cache import MatchResult
from sglang.srt.mem_cache.cache_init_params import CacheInitParams
from sglang.srt.mem_cache.hicache_storage import PoolName, PoolTransfer
from sglang.srt.mem_cache.radix_cache import RadixKey

from cached_attention.chain import PageRun
from cached_attention.layout import DevicePool
from cached_attention.tiers.disk_ranks import WINDOWS

from .hybrid import HybridLinker, HybridTreeLink
from .layer_events import Layer
from .linker import PathTransfer, page_keys
from .pools import window_pool

if TYPE_CHECKING:
    from sglang.srt.managers.schedule_batch import Req

LEAST_CHAIN = 16
"""Pages: a window is kept with up to so many before it."""


class WindowsLinker(HybridLinker):
    """The trailing store has the KV of the layers with windows, page by page. A prefix needs the last of it."""

    what = WINDOWS
    pool_name = PoolName.SWA
    immovable = "some of its layers keep a sliding window only"

    def _trailing_pool(self, params: CacheInitParams) -> DevicePool:
        # As SGLang's tree counts them: a draft model may read further back.
        self.span = -(-(params.swa_retain_window or 1) // params.page_size)
        self.chain_pages = max(LEAST_CHAIN, self.span)
        return window_pool(params)

    def _order_layers(self) -> int:
        self._numbers = self._kv_cache.layers_mapping
        return max(self._numbers) + 1

    def _hand_out(self, batch: int, layers: Sequence[Layer]) -> None:
        """Each layer waits for what it reads.

        Which forward used a slot of windows last is not watched: the load waits for all of them.
        """
        windows = self.store.start_tail(batch, self.record_offload_ready()).layers
        of_model = [(windows if is_window else layers)[number] for number, is_window in self._in_order()]
        self.layer_done_counter.add(batch, of_model)

    def _in_order(self) -> list[tuple[int, bool]]:
        return [self._numbers[layer] for layer in range(self.layer_done_counter.num_layers)]

    def _trailing_run(self, kv: PoolTransfer | None, trailing: PoolTransfer) -> PageRun:
        """The last pages of the node."""
        prefix = kv.prefix_hashes if isinstance(kv, PathTransfer) else []
        before = [*prefix, *((kv.keys if kv else None) or [])][: -len(trailing.keys or []) or None]
        parent = bytes.fromhex(before[-1]) if before else None
        return PageRun(parent, len(before), page_keys(trailing.keys or []), trailing.device_indices)


class WindowsTreeLink(HybridTreeLink):
    """What can be restored ends where the windows before it were saved."""

    cache_linker: WindowsLinker

    def match(self, key: RadixKey, req: Req, result: MatchResult) -> MatchResult:
        result = super().match(key, req, result)
        if (hit := self.hit_markers.get(req.rid)) is None:
            return result
        tokens = min(len(hit.tail_hashes), self.cache_linker.span) * self.cache.page_size
        return result._replace(swa_host_hit_length=max(result.swa_host_hit_length, tokens))
