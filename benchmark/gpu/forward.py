"""Prefill of a Llama over a KV pool in plain torch: enough of a model to see how much of a load it hides."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch.nn import functional as F
from torch.nn.attention.bias import causal_lower_right

from benchmark.gpu.kernels import rotation
from benchmark.gpu.setting import Setting
from cached_attention.layout import DevicePool

EPSILON = 1e-5


class Layer(NamedTuple):
    """Weights, `[out, in]`."""

    qkv: torch.Tensor
    out: torch.Tensor
    gate_up: torch.Tensor
    down: torch.Tensor


class Llama:
    """Random weights and one conversation, whose tokens are in the first slots of the pool, in order.

    Args:
        tokens: number of slots of the pool.
    """

    def __init__(self, setting: Setting, tokens: int, page_size: int) -> None:
        self.shape, self._dim = setting.shape, setting.head_dim
        self._device, self._dtype = setting.device, setting.dtype
        self._random = torch.Generator(setting.device).manual_seed(0)
        shape = self.shape
        heads = (shape.heads + 2 * shape.kv_heads) * self._dim
        self._layers = [
            Layer(
                self._weight(heads, shape.hidden),
                self._weight(shape.hidden, shape.heads * self._dim),
                self._weight(2 * shape.intermediate, shape.hidden),
                self._weight(shape.hidden, shape.intermediate),
            )
            for _ in range(shape.layers)
        ]
        self._embedding = self._weight(shape.vocabulary, shape.hidden) * shape.hidden**0.5
        self._head = self._weight(shape.vocabulary, shape.hidden)
        sizes = (shape.layers, 2, tokens, shape.kv_heads, self._dim)
        self.kv = torch.zeros(sizes, device=setting.device, dtype=setting.dtype)
        self.pool = DevicePool([list(layer) for layer in self.kv], page_size)
        frequencies = torch.tensor(rotation(self._dim).inv_freq, dtype=torch.float64)
        angles = torch.arange(tokens, dtype=torch.float64).unsqueeze(1) * frequencies
        self._cos, self._sin = (part.float().to(setting.device) for part in (angles.cos(), angles.sin()))

    def words(self, count: int) -> torch.Tensor:
        """`[count]`, int64: random tokens."""
        end = self.shape.vocabulary
        return torch.randint(0, end, (count,), generator=self._random, device=self._device)

    @torch.inference_mode()
    def prefill(
        self, tokens: torch.Tensor, first: int, ready: Callable[[int], None] = lambda layer: None
    ) -> torch.Tensor:
        """Compute `tokens` at positions from `first` on, attending to what the pool has before them.

        `ready(layer)` is called before a layer's KV is read.

        Returns:
            The logits of the last token, `[vocabulary]`.
        """
        positions = slice(first, first + len(tokens))
        x = self._embedding[tokens]
        for number, layer in enumerate(self._layers):
            x = x + self._attend(number, layer, self._normal(x), positions, ready)
            gate, up = F.linear(self._normal(x), layer.gate_up).chunk(2, dim=-1)
            x = x + F.linear(F.silu(gate) * up, layer.down)
        return F.linear(self._normal(x[-1:]), self._head)[0]

    def _attend(
        self, number: int, layer: Layer, x: torch.Tensor, positions: slice, ready: Callable[[int], None]
    ) -> torch.Tensor:
        shape = self.shape
        heads = F.linear(x, layer.qkv).view(len(x), -1, self._dim)
        q, k, v = heads.split((shape.heads, shape.kv_heads, shape.kv_heads), dim=1)
        keys, values = self.kv[number]
        keys[positions], values[positions] = self._turn(k, positions), v
        ready(number)
        seen = positions.stop
        q, k, v = (
            side.transpose(0, 1).unsqueeze(0) for side in (self._turn(q, positions), keys[:seen], values[:seen])
        )
        # The last token attends to all of them, earlier ones to fewer.
        bias = causal_lower_right(len(x), seen)
        grouped = shape.heads != shape.kv_heads
        attended = F.scaled_dot_product_attention(q, k, v, attn_mask=bias, enable_gqa=grouped)
        return F.linear(attended[0].transpose(0, 1).reshape(len(x), -1), layer.out)

    def _turn(self, heads: torch.Tensor, positions: slice) -> torch.Tensor:
        cos, sin = (part[positions].unsqueeze(1) for part in (self._cos, self._sin))
        first, second = heads.float().chunk(2, dim=-1)
        turned = torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)
        return turned.to(heads.dtype)

    def _normal(self, x: torch.Tensor) -> torch.Tensor:
        return F.rms_norm(x, x.shape[-1:], eps=EPSILON)

    def _weight(self, rows: int, columns: int) -> torch.Tensor:
        weight = torch.empty(rows, columns, device=self._device, dtype=self._dtype)
        return weight.normal_(0.0, columns**-0.5, generator=self._random)
