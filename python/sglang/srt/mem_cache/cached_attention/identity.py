"""Which model, and which part of it, this rank serves: the fingerprint of its pages."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import replace
from importlib.metadata import version
from secrets import token_hex
from types import MappingProxyType
from typing import Any, NamedTuple

import torch
import xxhash
from sglang.srt.mem_cache.cache_init_params import CacheInitParams
from sglang.srt.runtime_context import get_parallel
from sglang.srt.server_args import ServerArgs

from cached_attention.fingerprint import Fingerprint
from cached_attention.layout import DevicePool
from cached_attention.tiers.disk_ranks import rank_name

from .pools import draft_pools

SAMPLES = 1024
"""Approximate number of elements of each parameter that the digest reads."""
OF_THE_SERVER = {"transformers_version", "context_len", "encoder_only", "language_only"}
"""Entries of the model's config that SGLang or transformers adds, and on which no KV depends."""
INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
"""By size in bytes: types whose elements can be indexed on any device."""


def weights_digest(model: torch.nn.Module) -> str:
    """xxh3 over evenly spaced elements of every parameter and buffer, as they are on the device now.

    Detects quantisation, merged adapters and in-place updates, however the weights got there. An update that
    changes none of the sampled elements goes unnoticed.
    """
    digest = xxhash.xxh3_128()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        digest.update(_sample(tensor.detach()).contiguous().view(torch.uint8).cpu().numpy().tobytes())
    return digest.hexdigest()


def _sample(tensor: torch.Tensor) -> torch.Tensor:
    """Evenly spaced elements of `tensor`, at most twice `SAMPLES`; allocates no more than these."""
    step = max(1, tensor.numel() // SAMPLES)
    if tensor.is_contiguous():
        return tensor.view(-1)[::step]
    # Flattening would copy it: some hundred MB for a transposed FP8 weight, when the device has no room left.
    places = torch.arange(0, tensor.numel(), step, device=tensor.device)
    return tensor.view(INTEGERS[tensor.element_size()])[torch.unravel_index(places, tensor.shape)]


class AgreedWeights(NamedTuple):
    """Digests of the weights at the time when all ranks of a model told each other."""

    own: str
    all_ranks: str


def agree_on_weights(model: torch.nn.Module) -> AgreedWeights | None:
    """All ranks of the model call this, and wait for each other; None if there is only one."""
    group = get_parallel().tp_group
    if group.world_size == 1:
        return None
    own, digests = weights_digest(model), [""] * group.world_size
    torch.distributed.all_gather_object(digests, own, group=group.cpu_group)
    return AgreedWeights(own, xxhash.xxh3_128("".join(digests).encode()).hexdigest())


class Update(NamedTuple):
    """An update of the weights after which a rank's own may be what they were."""

    before: str
    """Digest of its weights before."""
    name: str


class ModelIdentity:
    """The fingerprints of one rank's pages, before and after updates of its weights.

    Args:
        alike: ranks that share an attention layer hold the same pages.
        other: what else decides whether a page may be reused.
    """

    def __init__(
        self,
        server_args: ServerArgs,
        params: CacheInitParams,
        pool: DevicePool,
        *,
        alike: bool = False,
        other: Mapping[str, str] = MappingProxyType({}),
    ) -> None:
        self._args = server_args
        self._pool = pool
        self._other = other
        self._has_draft = bool(draft_pools(params))
        ranks = get_parallel()
        self._replica = ranks.dp_rank or 0
        self._is_alone = ranks.tp_group.world_size == 1
        self._weights = ""
        self._update: Update | None = None
        self._ranks = {
            "tp_rank": ranks.tp_rank,
            "tp_size": ranks.tp_size,
            "pp_rank": params.pp_rank,
            "pp_size": params.pp_size,
            "attn_tp_size": ranks.attn_tp_size,
        }
        self._part = {
            "attn_tp_rank": 0 if alike else ranks.attn_tp_rank,
            "attn_tp_size": ranks.attn_tp_size,
            "pp_rank": params.pp_rank,
            "pp_size": params.pp_size,
        }

    @property
    def ranks_per_machine(self) -> int:
        """How many ranks share this machine's memory and disk."""
        args = self._args
        replicas = 1 if args.enable_dp_attention else args.dp_size
        return max(1, args.tp_size * args.pp_size * replicas // args.nnodes)

    @property
    def rank_directory(self) -> str:
        """Each rank owns a subdirectory; a single rank owns the whole directory."""
        return "." if self.ranks_per_machine == 1 else self.rank_name

    @property
    def rank_name(self) -> str:
        return rank_name(self._replica, self._ranks["pp_rank"], self._ranks["tp_rank"])

    def _draft(self) -> dict[str, str]:
        """What determines the KV of the draft model; empty without one."""
        args = self._args
        if not self._has_draft:
            return {}
        names = ("algorithm", "draft_model_path", "draft_model_revision", "draft_model_quantization")
        speculative = {name: getattr(args, f"speculative_{name}") for name in names}
        return {f"speculative_{name}": str(value) for name, value in speculative.items() if value is not None}

    def describe(self, model: torch.nn.Module, hf_config: Any, agreed: AgreedWeights | None = None) -> None:
        """`agreed`: for a `shared_fingerprint`, unless there is only one rank."""
        self._model = model
        self._config = hf_config.to_dict()
        self._agreed = agreed

    def updated(self) -> None:
        """Weights of the model were updated, perhaps only on other ranks."""
        if not self._is_alone:
            self._update = Update(self._weights, token_hex(8))

    def has_changed(self) -> bool:
        """Whether the weights have changed since the last `fingerprint`."""
        return weights_digest(self._model) != self._weights

    def fingerprint(self) -> Fingerprint:
        """Reads a sample of the weights: only servers with a disk or remote tier pay for it."""
        args, config = self._args, self._config
        self._weights = weights = weights_digest(self._model)
        if self._update is not None and weights == self._update.before:
            # The KV depends on all ranks, and others may have new weights.
            weights = f"{weights}, update {self._update.name}"
        decisive = {name: value for name, value in config.items() if name not in OF_THE_SERVER}
        text = json.dumps(decisive, sort_keys=True, default=str)
        rope = {name: value for name, value in config.items() if "rope" in name or "rotary" in name}
        return Fingerprint(
            model=str(args.model_path),
            weights=weights,
            kv_dtype=args.kv_cache_dtype,
            page_size=self._pool.layout.page_size,
            component_bytes=self._pool.layout.component_bytes,
            ranks=self._ranks,
            rope=json.loads(json.dumps(rope, default=str)),
            other={
                "config": hashlib.sha256(text.encode()).hexdigest(),
                "dtype": str(args.dtype),
                "overrides": str(args.json_model_override_args),
                "sglang": version("sglang"),
                **self._draft(),
                **self._other,
            },
        )

    def shared_fingerprint(self) -> Fingerprint:
        """Fingerprint for a store that all ranks share: equal for those that compute the same KV.

        With DP attention these are ranks of different replicas; with latent attention also those that share a
        layer. Once the weights have been updated, a rank knows only its own.
        """
        own = self.fingerprint()
        if self._is_alone:
            return replace(own, ranks=self._part)
        if self._agreed is None or own.weights != self._agreed.own:
            return own
        return replace(own, weights=self._agreed.all_ranks, ranks=self._part)
