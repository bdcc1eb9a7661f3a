"""Models some of whose layers keep one state per sequence: linear attention, Mamba."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from itertools import islice
from typing import TYPE_CHECKING, Any

import torch
from sglang.srt.mem_cache.base_prefix_cache import InsertParams, InsertResult, MatchResult
from sglang.srt.mem_cache.cache_init_params import CacheInitParams
from sglang.srt.mem_cache.hicache_storage import PoolName, PoolTransfer
from sglang.srt.mem_cache.radix_cache import RadixKey
from sglang.srt.mem_cache.unified_cache.component_type import ComponentType
from sglang.srt.mem_cache.unified_cache.unified_cache_linker import _PendingOffload
from sglang.srt.server_args import ServerArgs

from cached_attention.chain import Chain, PageRun
from cached_attention.config import format_size
from cached_attention.hybrid_store import HybridStore
from cached_attention.store import CachedAttentionStore
from cached_attention.tiers.disk import DiskTier
from cached_attention.tiers.disk_ranks import states_name

from .flags import REMOTE
from .identity import ModelIdentity
from .layer_events import Layer, LayerEvents
from .linker import CachedAttentionLinker, page_keys
from .never_waits import never_waits
from .pools import refuse, state_pool
from .rotary import UnsupportedRotationError
from .tree_link import TreeLink

if TYPE_CHECKING:
    from sglang.srt.managers.schedule_batch import Req
    from sglang.srt.mem_cache.unified_cache.unified_tree_core_interface import NodeId

logger = logging.getLogger(__name__)

ENDS = 64
"""Prefixes that ranks look for a common one among."""


class HybridLinker(CachedAttentionLinker):
    """Owns the stores of this rank's KV and states, which share host memory and disk as they share the device."""

    store: HybridStore

    def __init__(self, server_args: ServerArgs, params: CacheInitParams, **options: Any) -> None:
        super().__init__(server_args, params, **options)
        if self._config.remote is not None:
            refuse("states are not shared by servers", f"Leave {REMOTE.option} out")
        self._states = state_pool(params)
        self._state_identity = ModelIdentity(server_args, params, self._states)
        self.pools = {**self.pools, PoolName.MAMBA: self._states}
        slots, kv = params.req_to_token_pool, self._kv_cache
        self._sources = _sources(kv.full_attention_layer_id_mapping, slots.mamba_map, kv.start_layer)
        self.layer_done_counter = LayerEvents(len(self._sources), self._load_waited if self.on_cpu else None)
        # The pool of KV is told by SGLang.
        slots.register_layer_transfer_counter(self.layer_done_counter)

    def open(self, model: torch.nn.Module, hf_config: Any) -> None:
        self._state_identity.describe(model, hf_config)
        super().open(model, hf_config)

    def _make_store(self) -> HybridStore:
        policies, size = self._policies(), self._share(self._config.host_size)
        states = CachedAttentionStore(
            self._states, self._share_of_states(self._config.host_size), self._open_states(), **policies
        )
        return HybridStore(self._pool, size, self._open_disk(), states=states, **policies)

    def _share(self, size: int) -> int:
        """What the KV of this rank has of `size` bytes of its machine; its states have the rest."""
        kv, states = (pool.num_pages * pool.layout.page_bytes for pool in (self._pool, self._states))
        return super()._share(size) * kv // (kv + states)

    def _share_of_states(self, size: int) -> int:
        return super()._share(size) - self._share(size)

    def _open_disk(self) -> DiskTier | None:
        size = self._share(self._config.disk_size)
        return self._open_directory(self._identity.rank_name, self._identity, size)

    def _open_states(self) -> DiskTier | None:
        size = self._share_of_states(self._config.disk_size)
        return self._open_directory(states_name(self._identity.rank_name), self._state_identity, size)

    def _find_rotations(self, model: torch.nn.Module) -> None:
        self._immovable = UnsupportedRotationError(
            "CachedAttention does not truncate conversations of this model because some of its layers keep one "
            "state of all tokens. Over-long prompts are treated as SGLang does without it."
        )

    def _announce(self) -> None:
        super()._announce()
        states = self.store.states
        for tier, count in states.counters().items():
            if tier in ("host_pages", "disk_pages"):
                logger.info(
                    "CachedAttention: %s tier of %d states of %s per rank beside it.",
                    tier.removesuffix("_pages"),
                    count,
                    format_size(states.layout.page_bytes),
                )

    @never_waits
    def load(self, rid: str, transfers: list[PoolTransfer]) -> bool:
        kv, state = transfers
        if not super().load(rid, [kv]):
            return False
        known = self._record_indices_ready()
        if self.store.states.queue_load(rid, page_keys(state.keys or []), state.device_indices, known):
            return True
        self.store.cancel_load(rid)
        return False

    def _start_load(self, batch: int) -> Sequence[Layer]:
        # Which forward used a slot of states last is not watched: all of them are waited for.
        states = self.store.states.start_load(batch, self.record_offload_ready()).layers
        sources = {PoolName.KV: super()._start_load(batch), PoolName.MAMBA: states}
        return [sources[pool][layer] for pool, layer in self._sources]

    @never_waits
    def offload(self, transfers: list[PoolTransfer], session_id: str | None = None) -> bool:
        by_pool = {transfer.name: transfer for transfer in transfers}
        kv, state = by_pool.get(PoolName.KV), by_pool.get(PoolName.MAMBA)
        self.store.save(
            self.page_run(kv) if kv else None,
            self.record_offload_ready(),
            PageRun(None, 0, page_keys(state.keys), state.device_indices) if state else None,
        )
        return True

    def reset(self) -> None:
        states = self.store.states
        if self._has_other_pages(states, self._state_identity):
            states.replace_disk(lambda: self._try_to_open(self._open_states))
        super().reset()

    def describe(self) -> dict[str, Any]:
        states = self.store.states
        return super().describe() | {"states": {"state_bytes": states.layout.page_bytes, **states.counters()}}


def _sources(kv_layers: dict[int, int], state_layers: dict[int, int], start: int) -> list[tuple[PoolName, int]]:
    """Per layer of this rank's model the pool that it reads, and which layer of it."""
    sources = {layer: (PoolName.KV, number) for layer, number in kv_layers.items()}
    sources |= {layer: (PoolName.MAMBA, number) for layer, number in state_layers.items()}
    return [sources[layer] for layer in range(start, start + len(sources))]


class HybridTreeLink(TreeLink):
    """What can be restored ends where a state was saved."""

    cache_linker: HybridLinker

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self._with_state: set[NodeId] = set()
        """Nodes that were saved with their states while a prompt was inserted."""

    def match(self, key: RadixKey, req: Req, result: MatchResult) -> MatchResult:
        result = super().match(key, req, result)
        return result._replace(mamba_host_hit_length=1) if self.has_hit(req.rid) else result

    def _agree(self, req: Req, chain: Chain, pages: int, on_device: int) -> int:
        ends = self.cache_linker.store.ends(chain, pages)
        if self.cache.tp_world_size == 1:
            end = next(ends, 0)
        else:
            here = list(islice(ends, ENDS))
            end = self._sync_restorable_prefix(here, num_pages=len(chain.keys), device_hit_pages=on_device)
        if end > on_device:
            self.cache_linker.store.reserve_state(req.rid, chain.keys[end - 1])
        return end

    def _offload_node(self, node_id: NodeId, transfers: list[PoolTransfer]) -> None:
        super()._offload_node(node_id, transfers)
        if len(transfers) > 1:
            self._with_state.add(node_id)

    def inserted(self, params: InsertParams, result: InsertResult) -> None:
        """Save a state that came to a node after its KV: where prompts that share a beginning part."""
        node = result.last_device_node
        if params.mamba_value is not None and not result.mamba_exist and node not in self._with_state:
            self._offload_state(node)
        self._with_state.clear()

    def _offload_state(self, node: NodeId) -> None:
        state = self.cache.tree_core.get_component_device_value(node, ComponentType.MAMBA)
        last = self.cache.get_last_hash_value(node)
        if state is None or last is None:
            return
        lock = self.cache.inc_lock_ref(node).to_dec_params()
        self.cache_linker.offload([PoolTransfer(PoolName.MAMBA, None, state, [last])])
        # With no node to be marked: the tree marks those whose KV is kept.
        self.pending_offloads.append(_PendingOffload(node, lock, []))
