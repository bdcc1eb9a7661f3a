"""Models some of whose layers keep one state per sequence: linear attention, Mamba."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator, Sequence
from itertools import islice
from typing import TYPE_CHECKING, Any

import torch
from sglang.srt.mem_cache.base_prefix_cache import InsertParams, InsertResult, MatchResult
from sglang.srt.mem_cache.cache_init_params import CacheInitParams
from sglang.srt.mem_cache.hicache_storage import PoolName, PoolTransfer
from sglang.srt.mem_cache.radix_cache import RadixKey
from sglang.srt.mem_cache.unified_cache.component_type import ComponentType
from sglang.srt.mem_cache.unified_cache.unified_cache_linker import _PendingOffload
from sglang.srt.runtime_context import mamba_checkpoint_grid
from sglang.srt.server_args import ServerArgs

from cached_attention.chain import Chain, PageRun
from cached_attention.config import format_size
from cached_attention.hybrid_store import HybridStore
from cached_attention.layout import DevicePool
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
        self._state_identity = ModelIdentity(server_args, params, self._states, states=_form(self._states))
        self.pools = {**self.pools, PoolName.MAMBA: self._states}
        kv = self._kv_cache
        self._kv_before = _kv_before(kv.full_attention_layer_id_mapping, kv.start_layer)
        self.layer_done_counter = LayerEvents(len(self._kv_before), self._load_waited if self.on_cpu else None)

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

    def _hand_out(self, batch: int, layers: Sequence[Layer]) -> None:
        """The forward waits for all states before it begins: a graph may read them without asking.

        Which forward used a slot of states last is not watched: the load waits for all of them.
        """
        states = self.store.states.start_load(batch, self.record_offload_ready()).layers
        kv = [NOTHING if number is None else layers[number] for number in self._kv_before]
        self.layer_done_counter.add(batch, kv, states[-1:])

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
        replaces = self._has_other_pages(states, self._state_identity)
        super().reset()
        if replaces:
            states.replace_disk(lambda: self._try_to_open(self._open_states))
        else:
            states.reset()  # Also where only the disk of the KV was replaced.

    def weights_updated(self) -> None:
        super().weights_updated()
        self.store.states.detach_disk()

    def describe(self) -> dict[str, Any]:
        states = self.store.states
        return super().describe() | {"states": {"state_bytes": states.layout.page_bytes, **states.counters()}}


def _form(states: DevicePool) -> str:
    """Shape and type of what a slot has of each layer: the fingerprint knows only how many bytes that is."""
    parts = [[f"{part.dtype} {tuple(part.shape[1:])}" for part in layer] for layer in states.buffers]
    return json.dumps(parts)


def _kv_before(kv_layers: dict[int, int], start: int) -> list[int | None]:
    """Per layer of this rank's model, up to the last with attention: the number of the last KV up to there."""
    before: list[int | None] = []
    for layer in range(start, max(kv_layers) + 1):
        before.append(kv_layers.get(layer, before[-1] if before else None))
    return before


class _Nothing:
    """Of layers that come before all KV."""

    def wait(self, stream: Any = None) -> None:
        pass


NOTHING = _Nothing()


class HybridTreeLink(TreeLink):
    """What can be restored ends where a state was saved."""

    cache_linker: HybridLinker

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self._with_state: set[NodeId] = set()
        """Nodes that were saved with their states while a prompt was inserted."""
        self._parting = 0
        """Pages of the prompt that is matched after which others go on in another way, and no state is left."""

    def match(self, key: RadixKey, req: Req, result: MatchResult) -> MatchResult:
        self._parting = 0
        result = super().match(key, req, result)
        if self.has_hit(req.rid):
            result = result._replace(mamba_host_hit_length=1)
        return result._replace(mamba_branching_seqlen=self._branch(result.mamba_branching_seqlen))

    def _branch(self, on_device: int | None) -> int | None:
        """Tokens after which this prompt is to leave a state, not at its end: where it parts from others."""
        grid = mamba_checkpoint_grid(self.cache.page_size)
        return max(on_device or 0, self._parting * self.cache.page_size // grid * grid) or None

    def _arrive(self, req: Req, chain: Chain) -> None:
        store, end = self.cache_linker.store, None
        if self.cache.tp_world_size > 1:
            end = self._common(store.held_ends(chain), chain, 0)
        store.arrive(req.rid, chain, end=end)

    def _agree(self, req: Req, chain: Chain, pages: int, on_device: int) -> int:
        store = self.cache_linker.store
        end = self._common(store.ends(chain, pages), chain, on_device)
        if end > on_device:
            store.reserve_state(req.rid, chain.keys[end - 1])
        self._note_parting(chain, max(end, on_device))
        return end

    def _note_parting(self, chain: Chain, end: int) -> None:
        """See whether the pages that are known of a prompt, in any tier, are followed by those of others."""
        store = self.cache_linker.store
        known = self.ranks.agree(store.restorable_pages(chain))
        if known > end:
            self._parting = self.ranks.agree(known if store.is_followed(chain.keys[known - 1]) else 0)

    def _common(self, ends: Iterator[int], chain: Chain, beyond: int) -> int:
        """The longest of `ends` that every rank has; 0 where that is not `beyond`."""
        if self.cache.tp_world_size == 1:
            return next(ends, 0)
        here = list(islice(ends, ENDS))
        return self._sync_restorable_prefix(here, num_pages=len(chain.keys), device_hit_pages=beyond)

    def _spares(self) -> bool:
        """Whether a node may be kept on the device, with its state, until it is saved.

        SGLang does not survive that there is no slot for a state. So as many must be free, or evictable, as the
        requests that may yet run take, one for a request that goes on, and one for each save that runs: a node of
        a running request is held by its save alone once the request has gone on. All ranks see this alike, as
        they do the tree.
        """
        slots = self.cache.req_to_token_pool
        free = slots.mamba_allocator.available_size() + self.cache.mamba_evictable_size()
        yet_to_run = slots.available_size() * (1 + slots.mamba_initial_tracking_slots)
        return free > yet_to_run + 1 + len(self.pending_offloads)

    def _offload_node(self, node_id: NodeId, transfers: list[PoolTransfer]) -> None:
        if not self._spares():
            return  # The tree offers it again.
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
        tree = self.cache.tree_core
        if tree.build_external_linker_offload_transfers(node) is not None or not self._spares():
            return  # Its KV could not be saved, and will be tried again with the state.
        state = tree.get_component_device_value(node, ComponentType.MAMBA)
        last = self.cache.get_last_hash_value(node)
        if state is None or last is None:
            return
        lock = self.cache.inc_lock_ref(node).to_dec_params()
        self.cache_linker.offload([PoolTransfer(PoolName.MAMBA, None, state, [last])])
        # With no node to be marked: the tree marks those whose KV is kept.
        self.pending_offloads.append(_PendingOffload(node, lock, []))
