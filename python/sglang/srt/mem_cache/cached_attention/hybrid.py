"""Hybrid models: what their layers without full attention keep has a pool and a store of its own."""

from __future__ import annotations

import json
import logging
from abc import abstractmethod
from collections.abc import Iterator, Sequence
from itertools import islice
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from sglang.srt.mem_cache.base_prefix_cache import MatchResult
from sglang.srt.mem_cache.cache_init_params import CacheInitParams
from sglang.srt.mem_cache.hicache_storage import PoolName, PoolTransfer
from sglang.srt.mem_cache.radix_cache import RadixKey
from sglang.srt.mem_cache.unified_cache.unified_cache_linker import _PendingOffload
from sglang.srt.server_args import ServerArgs

from cached_attention.chain import Chain, PageRun
from cached_attention.hybrid_store import HybridStore
from cached_attention.layout import DevicePool
from cached_attention.store import CachedAttentionStore
from cached_attention.tiers.disk_ranks import Beside, beside
from cached_attention.trailing_store import TrailingStore
from cached_attention.units import format_size

from .identity import ModelIdentity
from .layer_events import LayerEvents
from .linker import CachedAttentionLinker, page_keys
from .lower_tiers import LowerTiers
from .never_waits import never_waits
from .rotary import UnsupportedRotationError
from .tree_link import TreeLink

if TYPE_CHECKING:
    from sglang.srt.managers.schedule_batch import Req
    from sglang.srt.mem_cache.unified_cache.unified_tree_core_interface import NodeId

logger = logging.getLogger(__name__)

ENDS = 64
"""Number of prefixes among which ranks look for a common one."""


class HybridLinker(CachedAttentionLinker):
    """Owns two stores, for KV and for `what`; host memory and disk are divided in the ratio of their pools."""

    store: HybridStore
    what: ClassVar[Beside]
    pool_name: ClassVar[PoolName]
    span = 1
    """See `HybridStore`."""
    chain_pages = 1
    """See `CachedAttentionStore`."""
    immovable: ClassVar[str]
    """Why the keys of such a model cannot be moved to other positions."""

    def __init__(self, server_args: ServerArgs, params: CacheInitParams, **options: Any) -> None:
        super().__init__(server_args, params, **options)
        self._trailing = self._trailing_pool(params)
        form: dict[str, str] = {self.what: form_of(self._trailing)}
        identity = ModelIdentity(server_args, params, self._trailing, other=form)
        directory = beside(self._directory, self.what)
        # The tiers of the KV lend what this rank lends.
        self._lower.append(LowerTiers(self._config, identity, directory, self._rest, lends=False))
        self.pools = {**self.pools, self.pool_name: self._trailing}
        layers, waited = self._order_layers(), self._load_waited if self.on_cpu else None
        self.layer_done_counter = LayerEvents(layers, waited)

    @abstractmethod
    def _trailing_pool(self, params: CacheInitParams) -> DevicePool:
        """The pool of `what`."""

    @abstractmethod
    def _order_layers(self) -> int:
        """Prepare what `_hand_out` needs to know about the layers; returns how many the model has."""

    def _make_store(self) -> HybridStore:
        policies, size = self._policies(), self._share(self._config.host_size)
        kv, beside_it = self._lower
        trailing = TrailingStore(
            self._trailing,
            self._rest(self._config.host_size),
            beside_it.open_disk(),
            beside_it.connect(),
            chain_pages=self.chain_pages,
            **policies,
        )
        return HybridStore(
            self._pool,
            size,
            kv.open_disk(),
            kv.connect(),
            trailing=trailing,
            span=self.span,
            **policies,
        )

    def _share(self, size: int) -> int:
        """The share of this rank's KV in `size` bytes of its machine."""
        kv, trailing = (pool.num_pages * pool.layout.page_bytes for pool in (self._pool, self._trailing))
        return super()._share(size) * kv // (kv + trailing)

    def _rest(self, size: int) -> int:
        return super()._share(size) - self._share(size)

    @property
    def _directory(self) -> str:
        return self._identity.rank_name  # What is beside it needs a name of its own.

    def _find_rotations(self, model: torch.nn.Module) -> None:
        self._immovable = UnsupportedRotationError(
            f"CachedAttention does not truncate conversations of this model because {self.immovable}. Over-long "
            "prompts are treated as SGLang does without it."
        )

    def announce(self) -> None:
        super().announce()
        trailing = self.store.trailing
        for tier, count in trailing.counters().items():
            if tier in ("host_pages", "disk_pages"):
                logger.info(
                    "CachedAttention: %s tier of %d %s of %s per rank beside it.",
                    tier.removesuffix("_pages"),
                    count,
                    self.what,
                    format_size(trailing.layout.page_bytes),
                )

    @never_waits
    def load(self, rid: str, transfers: list[PoolTransfer]) -> bool:
        kv, trailing = transfers
        if not super().load(rid, [kv]):
            return False
        known = self._record_indices_ready()
        if self.store.queue_tail(rid, page_keys(trailing.keys or []), trailing.device_indices, known):
            return True
        self.store.cancel_load(rid)
        return False

    @never_waits
    def offload(self, transfers: list[PoolTransfer], session_id: str | None = None) -> bool:
        by_pool = {transfer.name: transfer for transfer in transfers}
        kv, trailing = by_pool.get(PoolName.KV), by_pool.get(self.pool_name)
        self.store.save(
            self.page_run(kv) if kv else None,
            self.record_offload_ready(),
            self._trailing_run(kv, trailing) if trailing else None,
        )
        return True

    @abstractmethod
    def _trailing_run(self, kv: PoolTransfer | None, trailing: PoolTransfer) -> PageRun:
        """The transfer `trailing`, with `kv` or by itself, as pages of the trailing store."""

    @property
    def _stores(self) -> list[CachedAttentionStore]:
        return [self.store, self.store.trailing]

    def describe(self) -> dict[str, Any]:
        trailing = self.store.trailing
        # A page of states is one state.
        size = {f"{self.what.removesuffix('s')}_bytes": trailing.layout.page_bytes}
        return super().describe() | {self.what: {**size, **trailing.counters()}}


def form_of(pool: DevicePool) -> str:
    """Shape and type of each layer's part of a slot; the fingerprint otherwise has only its size in bytes."""
    parts = [[f"{part.dtype} {tuple(part.shape[1:])}" for part in layer] for layer in pool.buffers]
    return json.dumps(parts)


class HybridTreeLink(TreeLink):
    """A prefix can be restored only up to a point where the trailing store has what resuming needs."""

    cache_linker: HybridLinker

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self._parting = 0
        """Pages in the longest known prefix that other prompts continue but that has nothing saved to resume
        from; 0: none."""

    def match(self, key: RadixKey, req: Req, result: MatchResult) -> MatchResult:
        self._parting = 0
        return super().match(key, req, result)

    def _arrive(self, rid: str, chain: Chain, on_device: int) -> None:
        store, end = self.cache_linker.store, None
        if self.cache.tp_world_size > 1:
            store.decides_alone = False
            pages = self.ranks.agree(store.restorable_pages(chain))
            end = self._common(store.held_ends(chain, pages, on_device), chain, on_device)
            end = end or self._common(store.held_ends(chain, pages), chain, 0)
        store.arrive(rid, chain, on_device=on_device, end=end)

    def decide_again(self, rids: Sequence[str]) -> None:
        store = self.cache_linker.store
        if self.cache.tp_world_size == 1 or not rids:
            return
        decided = torch.tensor([not store.is_undecided(rid) for rid in rids], dtype=torch.int)
        self._take_least(decided)
        for rid, is_decided in zip(rids, decided.tolist(), strict=True):
            if not is_decided and (queued := store.queued.get(rid)) is not None:
                self._arrive(rid, queued.chain, queued.on_device)

    def _agree(self, req: Req, chain: Chain, pages: int, on_device: int) -> int:
        store = self.cache_linker.store
        # Each rank offers only its longest ends, so these must not exceed what all ranks can restore.
        end = self._common(store.ends(chain, self.ranks.agree(pages), on_device), chain, on_device)
        if end > on_device:
            store.reserve_tail(req.rid, chain, end, on_device)
        self._note_parting(chain, max(end, on_device))
        return end

    def _note_parting(self, chain: Chain, end: int) -> None:
        """Note whether other prompts continue the longest known prefix of `chain`, if it is longer than `end`."""
        store = self.cache_linker.store
        known = self.ranks.agree(store.restorable_pages(chain))
        if known > end:
            self._parting = self.ranks.agree(known if store.is_followed(chain.keys[known - 1]) else 0)

    def _common(self, ends: Iterator[int], chain: Chain, on_device: int) -> int:
        """The longest of `ends` that every rank has; 0 if it is not more than `on_device`."""
        if self.cache.tp_world_size == 1:
            return next(ends, 0)
        here = list(islice(ends, ENDS))
        return self._sync_restorable_prefix(here, num_pages=len(chain.keys), device_hit_pages=on_device)

    def replace_pending_offload_node(
        self, ack_id: NodeId, old_node_id: NodeId, new_node_ids: list[NodeId]
    ) -> None:
        # Upstream changes the first save of that node, which here may be one that marks no node.
        for place, save in enumerate(self.pending_offloads):
            if save.lock_node_id == ack_id and old_node_id in save.publish_node_ids:
                others = [node for node in save.publish_node_ids if node != old_node_id]
                self.pending_offloads[place] = save._replace(publish_node_ids=[*others, *new_node_ids])
                return

    def _offload_trailing(self, node: NodeId, trailing: PoolTransfer) -> None:
        """Save the trailing part that `node` received after its KV."""
        lock = self.cache.inc_lock_ref(node).to_dec_params()
        self.cache_linker.offload([trailing])
        # With no node to mark: the tree marks nodes whose KV is kept.
        self.pending_offloads.append(_PendingOffload(node, lock, []))
