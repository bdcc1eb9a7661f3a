"""How much KV a deployment has, and what it holds: arithmetic of the capacity planner."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

BYTES_PER_ELEMENT = {"bfloat16": 2, "float16": 2, "float32": 4, "fp8": 1}
DEFAULT_DTYPE = "bfloat16"
OTHER_STATES = (
    "mamba_num_heads",
    "mamba_n_heads",
    "mamba_d_state",
    "hybrid_override_pattern",
    "linear_attn_config",
)
"""Say that some layers keep states of a kind that the planner does not know."""
CONVOLUTION_BYTES, RECURRENCE_BYTES = 2, 4
"""Of an element of a state, as SGLang keeps them."""
RATIOS = (0.0, 0.1, 0.25)
HIT_RATES = (0.0, 0.51, 0.98)
"""Measured at those RCC/CCpUT (Gao et al., ATC 2024), none without storage; linear between."""
GPU_PRICE = 5.0
HOST_GB_PRICE = 0.0088
DISK_GB_PRICE = 0.000082
"""US dollars per hour: for a GPU, a GB of memory, a GB of disk (ibid.)."""


def kv_bytes_per_token(config: Mapping[str, Any], dtype: str = DEFAULT_DTYPE) -> int:
    """Bytes of K and V of one token in all layers and ranks, from a Hugging Face `config.json`.

    Raises:
        ValueError: the config does not say enough, or `dtype` is unknown.
    """
    config = config.get("text_config", config)
    if dtype not in BYTES_PER_ELEMENT:
        raise ValueError(f"KV dtype {dtype!r}: give one of {', '.join(BYTES_PER_ELEMENT)}.")
    try:
        layers = config["num_hidden_layers"] - _delta_nets(config)
        if config.get("kv_lora_rank"):
            elements = config["kv_lora_rank"] + config["qk_rope_head_dim"]
        else:
            heads = config["num_attention_heads"]
            dim = config.get("head_dim") or config["hidden_size"] // heads
            elements = 2 * (config.get("num_key_value_heads") or heads) * dim
    except KeyError as error:
        raise ValueError(f"the config has no {error}: give --bytes-per-token instead.") from error
    return layers * (elements * BYTES_PER_ELEMENT[dtype] + _index_bytes(config.get("index_head_dim") or 0))


def state_bytes(config: Mapping[str, Any]) -> int:
    """Bytes of the state that a conversation has beside its KV; 0 where all layers have attention.

    Raises:
        ValueError: the config does not say enough.
    """
    config = config.get("text_config", config)
    if not (layers := _delta_nets(config)):
        return 0
    try:
        k_heads, v_heads = config["linear_num_key_heads"], config["linear_num_value_heads"]
        k_dim, v_dim = config["linear_key_head_dim"], config["linear_value_head_dim"]
        width = config["linear_conv_kernel_dim"]
    except KeyError as error:
        raise ValueError(f"the config has no {error}: give --bytes-per-token instead.") from error
    convolution = (2 * k_heads * k_dim + v_heads * v_dim) * (width - 1)
    return layers * (convolution * CONVOLUTION_BYTES + v_heads * v_dim * k_dim * RECURRENCE_BYTES)


def _delta_nets(config: Mapping[str, Any]) -> int:
    """Layers with a gated delta net instead of attention."""
    if known := [name for name in OTHER_STATES if config.get(name)]:
        raise ValueError(
            f"the planner does not know the states of a model with {known[0]}: give --bytes-per-token."
        )
    if types := config.get("layer_types"):
        return types.count("linear_attention")
    layers, interval = config.get("num_hidden_layers", 0), config.get("full_attention_interval")
    return layers - layers // interval if interval else 0


def _index_bytes(dim: int) -> int:
    """What DeepSeek's sparse attention keeps to choose tokens: a byte per element, a scale per 128."""
    return dim + dim // 128 * 4


@dataclass(frozen=True)
class Deployment:
    """Sizes in bytes, times in seconds."""

    bytes_per_token: int
    session_tokens: int
    """Mean length of a conversation when it is left."""
    longest_tokens: int
    """Longest a conversation can be."""
    sessions_per_hour: float
    """Distinct ones."""
    ttl: float
    gpus: int
    gpu_kv_size: int
    """For KV, over all GPUs."""
    host_size: int
    disk_size: int
    gpu_price: float = GPU_PRICE
    session_bytes: int = 0
    """Of a conversation beside its KV: the state of layers without attention."""

    def sessions_in(self, size: int) -> float:
        """Mean conversations that `size` bytes hold."""
        return size / self._bytes(self.session_tokens)

    def tokens_in(self, size: int) -> int:
        """Tokens of such conversations that `size` bytes hold."""
        return size * self.session_tokens // self._bytes(self.session_tokens)

    def _bytes(self, tokens: int) -> int:
        return tokens * self.bytes_per_token + self.session_bytes

    @property
    def required(self) -> float:
        """CCpUT with the time to live as unit time: distinct sessions in it, each as long as can be; bytes."""
        return self.sessions_per_hour * self.ttl / 3600 * self._bytes(self.longest_tokens)

    @property
    def ratio(self) -> float:
        """RCC/CCpUT: what there is of what would hold everything."""
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
        """Share of the cost saved where CachedAttention needs `speedup` times less GPU time."""
        return 1 - (self.compute_cost + self.storage_cost) / (speedup * self.compute_cost)
