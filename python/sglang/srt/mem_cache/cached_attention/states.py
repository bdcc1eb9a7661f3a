"""Models in which some layers keep one state per sequence: linear attention, Mamba."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from sglang.srt.mem_cache.base_prefix_cache import InsertParams, InsertResult, MatchResult
from sglang.srt.mem_cache.cache_init_params import CacheInitParams
from sglang.srt.mem_cache.hicache_storage import PoolName, PoolTransfer
from sglang.srt.mem_cache.radix_cache import RadixKey
from sglang.srt.mem_cache.unified_cache.component_type import ComponentType
from sglang.srt.runtime_context import mamba_checkpoint_grid

from cached_attention.chain import PageRun
from cached_attention.layout import DevicePool
from cached_attention.tiers.disk_ranks import STATES

from .hybrid import HybridLinker, HybridTreeLink
from .layer_events import Layer
from .linker import page_keys
from .pools import state_pool

if TYPE_CHECKING:
    from sglang.srt.managers.schedule_batch import Req
    from sglang.srt.mem_cache.unified_cache.unified_tree_core_interface import NodeId


class StatesLinker(HybridLinker):
    """The trailing store holds states: each is a page of its own, under the key of the page that it follows."""

    what = STATES
    pool_name = PoolName.MAMBA
    immovable = "some of its layers keep one state of all tokens"

    def _trailing_pool(self, params: CacheInitParams) -> DevicePool:
        return state_pool(params)

    def _order_layers(self) -> int:
        self._kv_before = _kv_before(self._kv_cache.full_attention_layer_id_mapping, self._kv_cache.start_layer)
        return len(self._kv_before)

    def _hand_out(self, batch: int, layers: Sequence[Layer]) -> None:
        """The forward waits for all states before it begins: a graph may read them without waiting for a layer.

        Which forward used a slot of states last is not tracked, so the load waits for all forwards.
        """
        states = self.store.start_tail_load(batch, self.record_offload_ready()).layers
        kv = [NOTHING if number is None else layers[number] for number in self._kv_before]
        self.layer_done_counter.add(batch, kv, states[-1:])

    def _trailing_run(self, kv: PoolTransfer | None, trailing: PoolTransfer) -> PageRun:
        return PageRun(None, 0, page_keys(trailing.keys or []), trailing.device_indices)


def _kv_before(kv_layers: dict[int, int], start: int) -> list[int | None]:
    """Per layer of this rank's model, up to the last with attention: number of the last KV layer up to it."""
    before: list[int | None] = []
    for layer in range(start, max(kv_layers) + 1):
        before.append(kv_layers.get(layer, before[-1] if before else None))
    return before


class _Nothing:
    """For layers before the first one with KV."""

    def wait(self, stream: Any = None) -> None:
        pass


NOTHING = _Nothing()


class StatesTreeLink(HybridTreeLink):
    """A prefix can be restored only up to a page whose state was saved."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self._with_state: set[NodeId] = set()
        """Nodes that were saved with their states during the current insert."""

    def match(self, key: RadixKey, req: Req, result: MatchResult) -> MatchResult:
        result = super().match(key, req, result)
        if self.has_hit(req.rid):
            result = result._replace(mamba_host_hit_length=1)
        return result._replace(mamba_branching_seqlen=self._branch(result.mamba_branching_seqlen))

    def _branch(self, on_device: int | None) -> int | None:
        """Tokens after which this prompt should leave a state before its end: where it diverges from others."""
        grid = mamba_checkpoint_grid(self.cache.page_size)
        return max(on_device or 0, self._parting * self.cache.page_size // grid * grid) or None

    def _spares(self) -> bool:
        """Whether a node may be kept on the device, with its state, until it is saved.

        SGLang crashes if it finds no slot for a state. So there must be as many free or evictable slots as the
        requests that may still start need, one for a request that continues, and one per running save: a node of
        a running request is held only by its save once the request has moved on. All ranks agree on this, as they
        do on the tree.
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
        """Save a state that a node received after its KV: where prompts with a common beginning diverge."""
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
        self._offload_trailing(node, PoolTransfer(PoolName.MAMBA, None, state, [last]))
