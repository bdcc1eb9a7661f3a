"""Arithmetic of the capacity planner: how much KV a deployment needs, and how much it can hold."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

BYTES_PER_ELEMENT = {"bfloat16": 2, "float16": 2, "float32": 4, "fp8": 1}
_DTYPES = {"half": "float16", "float": "float32"} | {name: name for name in ("bfloat16", "float16", "float32")}
"""Names in configs, as SGLang reads them."""
OTHER_STATES = (
    "mamba_num_heads",
    "mamba_n_heads",
    "mamba_d_state",
    "hybrid_override_pattern",
    "linear_attn_config",
)
"""Config keys of models whose layers keep states that the planner does not know."""
CONVOLUTION_BYTES, RECURRENCE_BYTES = 2, 4
"""Bytes per element of the two states, as SGLang keeps them."""
RATIOS = (0.0, 0.1, 0.25)
HIT_RATES = (0.0, 0.51, 0.98)
"""Measured at these RCC/CCpUT (Gao et al., ATC 2024); zero without storage, linear in between."""
GPU_PRICE = 5.0
HOST_GB_PRICE = 0.0088
DISK_GB_PRICE = 0.000082
"""US dollars per hour for one GPU, one GB of host memory, one GB of disk (ibid.)."""


def stored_dtype(config: Mapping[str, Any]) -> str | None:
    """Dtype of the checkpoint, from a Hugging Face `config.json`; None if it names none that SGLang knows."""
    for part in (config.get("text_config", config), config):
        if named := part.get("dtype") or part.get("torch_dtype"):
            return _DTYPES.get(str(named))
    return None


def served_dtype(config: Mapping[str, Any]) -> str:
    """Dtype of model and KV under SGLang's `--dtype auto --kv-cache-dtype auto`: never float32."""
    stored = stored_dtype(config)
    if stored not in (None, "float32"):
        return str(stored)
    kind = config.get("text_config", config).get("model_type") or config.get("model_type") or ""
    return "bfloat16" if kind.startswith("gemma") else "float16"


def kv_bytes_per_token(config: Mapping[str, Any], dtype: str = "bfloat16") -> int:
    """KV bytes of one token over all layers and ranks, from a Hugging Face `config.json`.

    Args:
        dtype: of `BYTES_PER_ELEMENT`.

    Raises:
        ValueError: the config lacks a value or has layers that the planner does not know.
    """
    config = config.get("text_config", config)
    try:
        layers = config["num_hidden_layers"] - sum(_has_delta_net(config))
        if config.get("kv_lora_rank"):
            elements = config["kv_lora_rank"] + config["qk_rope_head_dim"]
        else:
            heads = config["num_attention_heads"]
            dim = config.get("head_dim") or config["hidden_size"] // heads
            elements = 2 * (config.get("num_key_value_heads") or heads) * dim
    except KeyError as error:
        raise ValueError(f"the config has no {error}: give --bytes-per-token instead.") from error
    indexers = sum(_selects(config, layer) for layer, other in enumerate(_has_delta_net(config)) if not other)
    index = indexers * _index_bytes(config.get("index_head_dim") or 0)
    return layers * elements * BYTES_PER_ELEMENT[dtype] + index


def state_bytes(config: Mapping[str, Any]) -> int:
    """Bytes of state per conversation in addition to its KV; 0 if all layers have attention.

    Raises:
        ValueError: the config lacks a value or has layers that the planner does not know.
    """
    config = config.get("text_config", config)
    if not (layers := sum(_has_delta_net(config))):
        return 0
    try:
        k_heads, v_heads = config["linear_num_key_heads"], config["linear_num_value_heads"]
        k_dim, v_dim = config["linear_key_head_dim"], config["linear_value_head_dim"]
        width = config["linear_conv_kernel_dim"]
    except KeyError as error:
        raise ValueError(f"the config has no {error}: give --bytes-per-token instead.") from error
    convolution = (2 * k_heads * k_dim + v_heads * v_dim) * (width - 1)
    return layers * (convolution * CONVOLUTION_BYTES + v_heads * v_dim * k_dim * RECURRENCE_BYTES)


def _has_delta_net(config: Mapping[str, Any]) -> list[bool]:
    """Per layer: whether it has a gated delta net instead of attention."""
    if known := [name for name in OTHER_STATES if config.get(name)]:
        raise ValueError(
            f"the planner does not know the states of a model with {known[0]}: give --bytes-per-token."
        )
    if types := config.get("layer_types"):
        return [kind == "linear_attention" for kind in types]
    layers, interval = range(config.get("num_hidden_layers", 0)), config.get("full_attention_interval") or 1
    return [(layer + 1) % interval != 0 for layer in layers]


def _selects(config: Mapping[str, Any], layer: int) -> bool:
    """Whether a layer with sparse attention selects tokens, rather than take an earlier layer's selection."""
    if types := config.get("indexer_types"):
        return types[layer : layer + 1] != ["shared"]
    if (every := config.get("cli_factor") or 1) > 1:
        return layer % every == 0
    if pattern := config.get("index_topk_pattern"):
        return pattern[layer : layer + 1] != "S"
    every, first = config.get("index_topk_freq") or 1, config.get("index_skip_topk_offset") or 2
    return max(layer - first + 1, 0) % every == 0


def _index_bytes(dim: int) -> int:
    """Bytes that DeepSeek's sparse attention keeps to select tokens: one per element, a scale per 128."""
    return dim + dim // 128 * 4


@dataclass(frozen=True)
class Deployment:
    """Sizes in bytes, times in seconds."""

    bytes_per_token: int
    session_tokens: int
    """Mean final length of a conversation."""
    longest_tokens: int
    """Maximum length of a conversation."""
    sessions_per_hour: float
    """Distinct conversations."""
    ttl: float
    """Infinite if nothing expires."""
    gpus: int
    gpu_kv_size: int
    """GPU memory for KV, over all GPUs."""
    host_size: int
    disk_size: int
    gpu_price: float = GPU_PRICE
    session_bytes: int = 0
    """Per conversation, in addition to its KV: state of layers without attention."""

    def sessions_in(self, size: int) -> float:
        """Number of mean conversations that fit into `size` bytes."""
        return size / self._bytes(self.session_tokens)

    def tokens_in(self, size: int) -> int:
        """Number of tokens of such conversations that fit into `size` bytes."""
        return size * self.session_tokens // self._bytes(self.session_tokens)

    def _bytes(self, tokens: int) -> int:
        return tokens * self.bytes_per_token + self.session_bytes

    @property
    def required(self) -> float:
        """CCpUT with the TTL as unit time: bytes for all distinct sessions within it, each at maximum length;
        infinite if nothing expires.
        """
        return self.sessions_per_hour * self.ttl / 3600 * self._bytes(self.longest_tokens)

    @property
    def ratio(self) -> float:
        """RCC/CCpUT: available share of the storage that would hold everything."""
        return (self.host_size + self.disk_size) / self.required

    @property
    def hit_rate(self) -> float:
        return float(np.interp(self.ratio, RATIOS, HIT_RATES))

    @property
    def compute_cost(self) -> float:
        """US dollars per hour."""
        return self.gpus * self.gpu_price

    @property
    def storage_cost(self) -> float:
        """US dollars per hour."""
        return self.host_size / 1e9 * HOST_GB_PRICE + self.disk_size / 1e9 * DISK_GB_PRICE

    def saving(self, speedup: float) -> float:
        """Share of the cost saved if CachedAttention needs `speedup` times less GPU time."""
        return 1 - (self.compute_cost + self.storage_cost) / (speedup * self.compute_cost)
