"""One copy of the pages of an MLA model, which are identical on all tensor-parallel ranks.

The first rank keeps the store, with the memory of all ranks. The others know no pages: they rely on the first
rank for what can be restored, and receive each layer by broadcast, on the forward's stream and from the first
rank's device, once it has landed there.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from sglang.srt.environ import envs
from sglang.srt.mem_cache.cache_init_params import CacheInitParams
from sglang.srt.mem_cache.hicache_storage import PoolTransfer
from sglang.srt.mem_cache.memory_pool import MLATokenToKVPool
from sglang.srt.mem_cache.mla_host_dedup import MLAHostDedupBroadcaster
from sglang.srt.mem_cache.unified_cache.component_type import ComponentType

from cached_attention.chain import Chain
from cached_attention.config import CachedAttentionConfig

from .flags import MLA_DEDUP
from .layer_events import Layer
from .linker import CachedAttentionLinker
from .pools import refuse

logger = logging.getLogger(__name__)

STAGED_TOKENS = 64
"""Tokens per layer broadcast at once: 5 MB of device memory for the 61 layers of DeepSeek-V3 in bfloat16."""


class Relay:
    """The layers of one load: each lands on the first rank, then is sent to the others, in order and once.

    Args:
        landed: the layers on this rank; empty on a rank that only receives.
        send: sends or receives a layer on the current stream.
    """

    def __init__(self, num_layers: int, landed: Sequence[Layer], send: Callable[[int], None]) -> None:
        self._landed = landed
        self._send = send
        self._sent = 0
        self.layers = [RelayedLayer(self, layer) for layer in range(num_layers)]

    def send_through(self, layer: int) -> None:
        """Send the layers up to `layer` that have not been sent yet."""
        for next_layer in range(self._sent, layer + 1):
            if self._landed:
                self._landed[next_layer].wait()
            self._send(next_layer)
            self._sent = next_layer + 1

    def send_all(self) -> None:
        self.send_through(len(self.layers) - 1)


class RelayedLayer(NamedTuple):
    relay: Relay
    number: int

    def wait(self, stream: Any = None) -> None:
        self.relay.send_through(self.number)


class MlaDedupLinker(CachedAttentionLinker):
    """The linker of `--cached-attention-mla-dedup`; has no effect if no ranks hold identical pages."""

    def __init__(
        self, server_args: Any, params: CacheInitParams, *, components: set[ComponentType], **options: Any
    ) -> None:
        if others := components & {ComponentType.MAMBA, ComponentType.SWA}:
            what = "states" if ComponentType.MAMBA in others else "windows"
            refuse(f"its {what} are not broadcast", f"Leave {MLA_DEDUP.option} out")
        super().__init__(server_args, params, components=components, **options)
        self._broadcaster = _broadcaster(params, self.on_cpu)
        self._keeps = self._broadcaster is None or self._broadcaster.is_src
        self._configure(self._config)
        self._queued: dict[str, torch.Tensor] = {}
        """Device slots of queued loads, by request."""
        self._slots = torch.empty(0, dtype=torch.int64)
        self._relays: dict[int, Relay] = {}
        self._offloads = 0
        """On a rank that keeps nothing: saves accepted and not yet reported."""

    def _share(self, size: int) -> int:
        if not self._keeps:
            return self._pool.layout.stride
        alike = 1 if self._broadcaster is None else torch.distributed.get_world_size(self._broadcaster.group)
        return size // max(1, self._identity.ranks_per_machine // alike)

    @property
    def configured_tiers(self) -> frozenset[str]:
        return super().configured_tiers if self._keeps else frozenset({"host"})

    def _configure(self, config: CachedAttentionConfig) -> None:
        super()._configure(config)
        if not self._keeps:
            (lower,) = self._lower
            lower.config = replace(config, disk_path=None, remote=None)

    def announce(self) -> None:
        if self._keeps:
            super().announce()
        else:
            logger.info("CachedAttention: this rank gets its pages from the first rank.")

    def _find_rotations(self, model: torch.nn.Module) -> None:
        super()._find_rotations(model)
        if not self._keeps:
            self.rotations = None  # Keys arrive rotated; no sources need to be looked up.

    # Lookups: the first rank decides what can be restored.

    def reserve(self, rid: str, chain: Chain) -> int:
        return super().reserve(rid, chain) if self._keeps else len(chain.keys)

    # Loads

    def load(self, rid: str, transfers: list[PoolTransfer]) -> bool:
        if self._keeps and not super().load(rid, transfers):
            return False
        (kv,) = transfers
        self._queued[rid] = kv.device_indices
        self.store.leave(rid)
        return True

    def cancel_queued_load(self, rid: str) -> bool:
        queued = self._queued.pop(rid, None) is not None
        super().cancel_queued_load(rid)
        return queued

    def start_layer_wise_loading(self) -> int:
        if not self._queued:
            return -1
        self._slots = torch.cat(list(self._queued.values())).to(torch.int64)
        self._queued = {}
        if self._keeps:
            return super().start_layer_wise_loading()
        batch = self.layer_done_counter.next_batch()
        self._hand_out(batch, [])
        return batch

    def _hand_out(self, batch: int, layers: Sequence[Layer]) -> None:
        if self._broadcaster is None:
            super()._hand_out(batch, layers)
            return
        prepared = self._broadcaster.prepare_broadcast(self._slots, self._stream_of_forwards())
        send = self._broadcaster.broadcast_loaded_layer
        relay = Relay(self.layer_done_counter.num_layers, layers, lambda layer: send(layer, prepared))
        self._relays[batch] = relay
        self.layer_done_counter.add(batch, relay.layers)

    def finish_layer_wise_loading(self, counter_index: int) -> bool:
        if (relay := self._relays.pop(counter_index, None)) is not None:
            with torch.cuda.stream(self._stream_of_forwards()):
                relay.send_all()
        if self._keeps:
            return super().finish_layer_wise_loading(counter_index)
        self.layer_done_counter.discard(counter_index)
        return True

    # Saves

    def offload(self, transfers: list[PoolTransfer], session_id: str | None = None) -> bool:
        if self._keeps:
            return super().offload(transfers, session_id)
        self._offloads += 1
        return True

    def lacks_parent(self, transfer: PoolTransfer) -> bool:
        return self._keeps and super().lacks_parent(transfer)

    def num_completed_offloads(self) -> int:
        completed = super().num_completed_offloads()
        return completed if self._keeps else self._offloads

    def pop_completed_offload(self) -> bool:
        if self._keeps:
            return super().pop_completed_offload()
        self._offloads -= 1
        return True

    def reset(self) -> None:
        self._queued, self._relays, self._offloads = {}, {}, 0
        super().reset()


def _broadcaster(params: CacheInitParams, on_cpu: bool) -> MLAHostDedupBroadcaster | None:
    """None if no other rank holds the same pages."""
    pool = params.token_to_kv_pool_allocator.get_kvcache()
    group = params.attn_tp_cache_group or params.tp_cache_group
    if type(pool) is not MLATokenToKVPool or group is None or torch.distributed.get_world_size(group) == 1:
        logger.warning("CachedAttention: --cached-attention-mla-dedup has no effect: no ranks hold equal pages.")
        return None
    if not envs.SGLANG_MLA_DEDUP_CHUNK_TOKENS.is_set():
        envs.SGLANG_MLA_DEDUP_CHUNK_TOKENS.set(STAGED_TOKENS)
    if on_cpu:
        return MLAHostDedupBroadcaster(pool, group, torch.distributed.get_process_group_ranks(group)[0])
    return MLAHostDedupBroadcaster.build(pool, params.tp_cache_group, params.attn_tp_cache_group)
