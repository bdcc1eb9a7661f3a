"""SGLang's linker interface, implemented with the store."""

from __future__ import annotations

import gc
import logging
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from sglang.srt.mem_cache.cache_init_params import CacheInitParams
from sglang.srt.mem_cache.hicache_storage import PoolName, PoolTransfer
from sglang.srt.mem_cache.unified_cache.component_type import ComponentType
from sglang.srt.mem_cache.unified_cache.unified_cache_linker import UnifiedCacheLinker
from sglang.srt.server_args import ServerArgs

from cached_attention.chain import Chain, PageRun
from cached_attention.config import CachedAttentionConfig, Policies
from cached_attention.position.rotation import Rotation
from cached_attention.position.truncation import TruncationRule
from cached_attention.store import CachedAttentionStore
from cached_attention.transfer.load_fence import LoadFence
from cached_attention.transfer.streams import Event
from cached_attention.units import format_size

from .free_slots import free_slots
from .identity import ModelIdentity, agree_on_weights
from .kv_events import KvEvents
from .layer_events import Layer, LayerEvents
from .lower_tiers import LowerTiers
from .never_waits import never_waits
from .pools import device_pool, draft_pools, is_replicated
from .rotary import UnsupportedRotationError, key_rotations

logger = logging.getLogger(__name__)

LEAST_PAGE = 16
"""Tokens per page below which the bookkeeping of a long prompt holds up the scheduler."""
FLUSH_SECONDS = 10.0
"""SGLang kills a scheduler that takes longer than 15 s to shut down."""


@dataclass
class PathTransfer(PoolTransfer):
    """The KV of one tree node, with the hashes of the pages before it."""

    prefix_hashes: Sequence[str] = field(default_factory=list)


def page_keys(hashes: Sequence[str]) -> list[bytes]:
    """SGLang's page hashes (hexadecimal SHA-256) as the store's keys."""
    return [bytes.fromhex(page_hash) for page_hash in hashes]


class CachedAttentionLinker(UnifiedCacheLinker):
    """Owns this rank's store."""

    rotations: list[Rotation | None] | None = None
    """Per layer: how keys are moved to other positions; None if they cannot be, or need not be."""
    _immovable: UnsupportedRotationError | None = None
    _weights_are_here = True
    kv_chain_pages: int | None = None
    """`chain_pages` of the KV's store, see `CachedAttentionStore`."""
    only_saves = False
    """Whether nothing that is saved is loaded on this server again."""
    events: KvEvents | None = None
    """With `--kv-events-config`, on the rank that publishes."""

    def __new__(
        cls, server_args: ServerArgs, *_args: Any, components: set[ComponentType], **_options: Any
    ) -> CachedAttentionLinker:
        # SGLang is given one class for all servers and models.
        if cls is CachedAttentionLinker and server_args.disaggregation_mode == "decode":
            from .answers import AnswersLinker

            return super().__new__(AnswersLinker)
        if cls is CachedAttentionLinker and ComponentType.MAMBA in components:
            from .states import StatesLinker

            return super().__new__(StatesLinker)
        if cls is CachedAttentionLinker and ComponentType.SWA in components:
            from .windows import WindowsLinker

            return super().__new__(WindowsLinker)
        return super().__new__(cls)

    def __init__(
        self,
        server_args: ServerArgs,
        params: CacheInitParams,
        *,
        components: set[ComponentType],
        extra_config: dict[str, Any],
        forward_stream: torch.cuda.Stream | None = None,
    ) -> None:
        self._config = CachedAttentionConfig.from_settings(extra_config)
        self._pool = device_pool(params, components)
        self._truncates = server_args.allow_auto_truncate
        self._params = params
        self._kv_cache = params.token_to_kv_pool_allocator.get_kvcache()
        self._identity = ModelIdentity(server_args, params, self._pool, alike=is_replicated(params))
        self._lower = [LowerTiers(self._config, self._identity, self._directory, self._share)]
        # Without overlap SGLang runs forwards on the stream of its scheduler, which is the current one.
        self.forward_stream = None if server_args.disable_overlap_schedule else forward_stream
        self.on_cpu = self._pool.device.type == "cpu"
        self.fence = LoadFence(free_slots(params.token_to_kv_pool_allocator))
        self.pools = {PoolName.KV: self._pool}
        waited = self._load_waited if self.on_cpu else None
        self.layer_done_counter = LayerEvents(self._pool.layout.num_layers, waited)

    def open(self, model: torch.nn.Module, hf_config: Any) -> None:
        """Create the store for `model`, and open its pages on disk.

        Raises:
            DirectoryInUseError: another server uses the disk tier's directory.
            PermissionError, NotADirectoryError, FileExistsError: it was badly chosen.
            ValueError: a tier is too small for a page.
        """
        agreed = None if self._config.remote is None else agree_on_weights(model)
        for lower in self._lower:
            lower.identity.describe(model, hf_config, agreed)
        if self._truncates:
            self._find_rotations(model)
        self.store = self._make_store()
        if self._params.enable_kv_cache_events and not self.only_saves:
            self.events = KvEvents(self.store.residency, self._params)
        self.announce()
        if (page_size := self._pool.layout.page_size) < LEAST_PAGE:
            logger.warning(
                "CachedAttention: pages of %d tokens take much of the scheduler's time. Give --page-size 64, "
                "and an --attention-backend that accepts it.",
                page_size,
            )

    @property
    def _directory(self) -> str:
        """Name of the directory of this rank's KV on disk."""
        return self._identity.rank_directory

    def _make_store(self) -> CachedAttentionStore:
        (lower,) = self._lower
        return CachedAttentionStore(
            self._pool,
            self._share(self._config.host_size),
            lower.open_disk(),
            lower.connect(),
            rotations=self.rotations,
            chain_pages=self.kv_chain_pages,
            **self._policies(),
        )

    def _policies(self) -> Policies:
        config = self._config
        return Policies(
            min_uses=config.disk_min_uses,
            ttl=config.ttl or None,
            look_ahead=config.look_ahead,
            wait=config.wait,
            eviction=config.eviction,
        )

    @property
    def configured_tiers(self) -> frozenset[str]:
        """Tiers that this rank is meant to have, whether or not they can be used."""
        below = {"disk": self._config.disk_path, "remote": self._config.remote}
        return frozenset({"host", *(tier for tier, place in below.items() if place is not None)})

    def _share(self, size: int) -> int:
        """This rank's share of `size` bytes of its machine."""
        return size // self._identity.ranks_per_machine

    def _load_waited(self, seconds: float) -> None:
        self.store.stats.load_waited(seconds)

    def _find_rotations(self, model: torch.nn.Module) -> None:
        try:
            self.rotations = key_rotations(model, self._kv_cache, draft_pools(self._params))
        except UnsupportedRotationError as error:
            self._immovable = error

    def announce(self) -> None:
        """Tiers were opened: say how large they are."""
        # A full collection would walk the index: 0.2 s per million pages, on the scheduler's thread.
        gc.freeze()
        layout, counters = self.store.layout, self.store.counters()
        for tier in ("host", "disk"):
            if pages := counters.get(f"{tier}_pages"):
                logger.info(
                    "CachedAttention: %s tier of %s per rank, %d tokens (%d pages of %s), %d pages in use.",
                    tier,
                    format_size(pages * layout.stride),
                    pages * layout.page_size,
                    pages,
                    format_size(layout.page_bytes),
                    counters[f"{tier}_pages_used"],
                )
        if (key := self._lower[0].key) is not None:
            # By its name, as `cached-attention inspect` shows it.
            logger.info("CachedAttention: what leaves host memory is encrypted, key %s.", key.id)

    def truncation_rule(self, window: int, limit: int) -> TruncationRule:
        """How a prompt that exceeds `window` tokens is truncated, see `TruncationRule`.

        Raises:
            ValueError: no prompt can be truncated; the message says why.
        """
        if self._immovable is not None:
            raise self._immovable
        config, page_size = self._config, self._pool.layout.page_size
        return TruncationRule(window, limit, page_size, config.truncation_ratio, config.sink_pages)

    def record_offload_ready(self) -> list[torch.cuda.Event]:
        # Without streams the forward has returned, and its pages are written, before this is called.
        return [] if self.on_cpu else super().record_offload_ready()

    def reserve(self, rid: str, chain: Chain) -> int:
        return self.store.reserve(rid, chain)

    @never_waits
    def lookup(self, rid: str, transfers: list[PoolTransfer]) -> list[int]:
        (kv,) = transfers
        return list(range(1, self.reserve(rid, Chain(page_keys(kv.keys or []))) + 1))

    @never_waits
    def load(self, rid: str, transfers: list[PoolTransfer]) -> bool:
        (kv,) = transfers
        keys = page_keys(kv.keys or [])
        return self.store.queue_load(rid, keys, kv.device_indices, self._record_indices_ready())

    def _record_indices_ready(self) -> list[Event]:
        """Events after which the current stream has computed which pages to load."""
        return [] if self.on_cpu else [torch.cuda.current_stream().record_event()]

    def cancel_queued_load(self, rid: str) -> bool:
        return self.store.cancel_load(rid)

    @never_waits
    def start_layer_wise_loading(self) -> int:
        if not self.store.has_queued_loads:
            return -1
        batch = self.layer_done_counter.next_batch()
        load = self.store.start_load(batch, self._record_slots_unused())
        self._hand_out(batch, load.layers)
        return batch

    def _hand_out(self, batch: int, layers: Sequence[Layer]) -> None:
        """Let the forward of `batch` wait for `layers`."""
        self.layer_done_counter.add(batch, layers)

    def _record_slots_unused(self) -> Sequence[Event]:
        """Events after which the slots of the loads are computed, and no forward touches them any more."""
        if self.fence.is_closed:
            return self.record_offload_ready()
        return [*self._record_indices_ready(), *self.fence.earlier]

    def forward_launched(self) -> None:
        """All forwards launched so far are done when everything on their stream is."""
        stream = self._stream_of_forwards()
        self.fence.launched([] if stream is None else [stream.record_event()])

    def _stream_of_forwards(self) -> torch.cuda.Stream | None:
        """None on a CPU."""
        return None if self.on_cpu else self.forward_stream or torch.cuda.current_stream()

    @never_waits
    def finish_layer_wise_loading(self, counter_index: int) -> bool:
        self.layer_done_counter.discard(counter_index)
        return self.store.finish_load(counter_index, self._stream_of_forwards())

    @never_waits
    def offload(self, transfers: list[PoolTransfer], session_id: str | None = None) -> bool:
        # Always accepted: ranks decline at different times, and must agree on what is pending.
        (kv,) = transfers
        self.store.save(self.page_run(kv), self.record_offload_ready())
        return True

    def lacks_parent(self, transfer: PoolTransfer) -> bool:
        """Whether `offload` needs the pages before those of `transfer` as well."""
        return self.store.lacks_parent(self.page_run(transfer))

    def page_run(self, transfer: PoolTransfer) -> PageRun:
        prefix = transfer.prefix_hashes if isinstance(transfer, PathTransfer) else []
        parent = bytes.fromhex(prefix[-1]) if prefix else None
        return PageRun(parent, len(prefix), page_keys(transfer.keys), transfer.device_indices)

    @never_waits
    def num_completed_offloads(self) -> int:
        return self.store.poll()

    def pop_completed_offload(self) -> bool:
        return self.store.pop_save()

    def reset(self) -> None:
        """Remove all pages. After a weight update the disk keeps the old pages, for the old weights.

        The remote store keeps its pages: other servers use them.
        """
        pairs = list(zip(self._lower, self._stores, strict=True))
        # All decisions first: a disk that fails during the reset is left alone until the next one.
        replaces = [self._weights_are_here and lower.has_other_pages(store) for lower, store in pairs]
        for (lower, store), replaces_disk in zip(pairs, replaces, strict=True):
            lower.reset(store, replaces_disk=replaces_disk, may_share=self._may_share)
        self.layer_done_counter.reset()

    @property
    def _may_share(self) -> bool:
        """Whether the weights to which pages belong from now on are known."""
        return self._weights_are_here

    @property
    def disk_path(self) -> str | None:
        """Directory of the disk tier, whether or not it can be used now; None: there is none."""
        return self._config.disk_path

    @property
    def has_its_disk(self) -> bool:
        """Whether what this rank is meant to keep on disk can be kept there."""
        return "disk" not in self.configured_tiers or all(store.disk is not None for store in self._stores)

    @property
    def weights_are_here(self) -> bool:
        """Whether the weights are in the device's memory, so that a store for them can be opened."""
        return self._weights_are_here

    def attach_disk(self, path: str, size: int, key: str | None) -> None:
        """The next `reset` opens a disk tier of up to `size` bytes, over all ranks of this machine.

        key: place of the key that encrypts it, unless the server was started with one.
        """
        key = self._config.encryption_key or key
        self._configure(replace(self._config, disk_path=path, disk_size=size, encryption_key=key))

    def detach_disk(self) -> None:
        """Continue without the disk tier, which keeps its pages. May be called while requests are running."""
        self.store.detach_disk()
        self._configure(replace(self._config, disk_path=None, disk_size=0))

    def _configure(self, config: CachedAttentionConfig) -> None:
        self._config = config
        for lower in self._lower:
            lower.config = config

    def weights_changed(self) -> None:
        """Weights were updated, or may be from now on, perhaps only those of other ranks."""
        self._pause_lower_tiers()
        for lower in self._lower:
            lower.identity.updated()

    def _pause_lower_tiers(self) -> None:
        """See `LowerTiers.pause`."""
        for lower, store in zip(self._lower, self._stores, strict=True):
            lower.pause(store)

    def check_weights(self) -> None:
        """An update has ended: pause the lower tiers, unless the weights are those for which pages are kept."""
        if self._leaves_memory and self._lower[0].identity.has_changed():
            self._pause_lower_tiers()

    @property
    def _stores(self) -> list[CachedAttentionStore]:
        return [self.store]

    @property
    def _leaves_memory(self) -> bool:
        """Whether pages may outlive the weights they were computed with."""
        return any(store.disk is not None or store.remote is not None for store in self._stores)

    def weights_left(self) -> None:
        """The weights are about to leave the device: until they are back, they cannot be read."""
        self._pause_lower_tiers()
        self._weights_are_here = False

    def weights_are_back(self) -> None:
        """Perhaps other ones: disk and remote store still wait for the next `reset`."""
        self._weights_are_here = True

    def close(self) -> None:
        left = self.store.flush(FLUSH_SECONDS)
        if left:
            logger.warning("CachedAttention: %d pages were not written to disk in %.0f s.", left, FLUSH_SECONDS)
        self.store.close()

    def describe(self) -> dict[str, Any]:
        store = self.store
        sizes = {"page_size": store.layout.page_size, "page_bytes": store.layout.page_bytes}
        return sizes | store.counters()
