"""A small language model of the Llama family: RMSNorm, rotary positions, grouped queries, SwiGLU."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

# Initial values of a model with look-up heads, chosen so that it copies most of what it can before training.
EMBEDDING = 0.06
"""Standard deviation of the embedding."""
FAST = 0.1
"""Radians per token from which a rotary pair distinguishes neighbours."""
SLOW = 1.5
"""Radians over the whole window up to which a rotary pair recognises its word at any distance."""
PREFERENCE = 8.0
"""Length of the bias that attends to the preceding token."""
SHARPNESS = 2.0
"""Sharpness of the look-up, as a gain of queries and keys."""
COPYING = 8.0
"""Scale of what is looked up, as a multiple of the embedding."""


@dataclass(frozen=True)
class Shape:
    """Sizes of a model, in elements; `window` is the longest context it is trained on, in tokens."""

    vocabulary: int
    hidden: int
    intermediate: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    window: int
    theta: float = 1_000_000.0

    @property
    def inverse_frequencies(self) -> Tensor:
        """`[head_dim / 2]`, float64, radians per token."""
        exponents = torch.arange(0, self.head_dim, 2, dtype=torch.float64) / self.head_dim
        return 1.0 / self.theta**exponents


class Cache(NamedTuple):
    """Rotated keys, and values, of some tokens, both `[layers, batch, kv_heads, tokens, head_dim]`."""

    keys: Tensor
    values: Tensor

    @property
    def tokens(self) -> int:
        return self.keys.shape[3]

    def followed_by(self, other: Cache) -> Cache:
        return Cache(torch.cat((self.keys, other.keys), 3), torch.cat((self.values, other.values), 3))

    def without(self, start: int, end: int) -> Cache:
        """All tokens except `start` to `end`, unchanged."""
        return Cache(*(torch.cat((one[..., :start, :], one[..., end:, :]), 3) for one in self))


class LanguageModel(nn.Module):
    """Computes next-token logits, and keys and values of the tokens read; float32."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.shape = shape
        self.embedding = nn.Embedding(shape.vocabulary, shape.hidden)
        self.blocks = nn.ModuleList(Block(shape) for _ in range(shape.layers))
        self.norm = nn.RMSNorm(shape.hidden, eps=1e-5)
        self._initialise()

    def forward(self, ids: Tensor, positions: Tensor, past: Cache | None = None) -> tuple[Tensor, Cache]:
        """Logits `[batch, tokens, vocabulary]` and the cache of the new tokens only.

        `ids`: `[batch, tokens]`, int64. `positions`: `[tokens]`, those of the new tokens, which attend to all of
        `past`, whatever the positions of its keys, and causally to one another.
        """
        turn = self.turn(positions)
        hidden = self.embedding(ids)
        keys, values = [], []
        for layer, block in enumerate(self.blocks):
            before = None if past is None else (past.keys[layer], past.values[layer])
            hidden, key, value = block(hidden, turn, before)
            keys.append(key)
            values.append(value)
        return self.norm(hidden) @ self.embedding.weight.T, Cache(torch.stack(keys), torch.stack(values))

    def turn(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Cosines and sines, `[tokens, head_dim / 2]` in float32, computed in float64."""
        frequencies = self.shape.inverse_frequencies.to(positions.device)
        angles = positions.to(torch.float64)[:, None] * frequencies
        return angles.cos().float(), angles.sin().float()

    def _initialise(self) -> None:
        for name, weight in self.named_parameters():
            if weight.dim() == 2:
                ends_a_branch = name.endswith(("output.weight", "down.weight"))
                nn.init.normal_(weight, std=0.02 / ((2 * self.shape.layers) ** 0.5 if ends_a_branch else 1.0))
            elif name.endswith("bias"):
                nn.init.zeros_(weight)
        nn.init.normal_(self.embedding.weight, std=EMBEDDING)
        if self.shape.kv_heads * self.shape.head_dim == self.shape.hidden and self.shape.layers > 1:
            first, second = [one for one in self.modules() if isinstance(one, Attention)][:2]
            look_up(first, second)


@torch.no_grad()
def look_up(first: Attention, second: Attention) -> None:
    """Make `first` pass on the preceding token, and `second` copy what followed earlier occurrences of its token.

    These are induction heads (Olsson et al. 2022), which let a model look things up in its context. A model of
    this size did not develop them by itself in 1,400 steps. Both layers continue to learn from there.
    """
    shape = first.shape
    group = shape.heads // shape.kv_heads
    frequencies = shape.inverse_frequencies
    fast = (frequencies > FAST).float()
    slow = (frequencies * shape.window < SLOW).float().repeat(2)
    before = torch.cat((fast, torch.zeros_like(fast))) * PREFERENCE / fast.sum().sqrt()
    angle = -frequencies.float()
    query = apply_rotary(before[None], (angle.cos()[None], angle.sin()[None]))[0]
    first.key.bias.copy_(before.repeat(shape.kv_heads))
    first.query.bias.copy_(query.repeat(shape.heads))
    moved, values, words = (nn.init.orthogonal_(torch.empty(shape.hidden, shape.hidden)) for _ in range(3))
    first.value.weight.copy_(values)
    second.value.weight.copy_(values)
    first.output.weight.copy_(EMBEDDING / group * moved @ _per_query(values, shape).T)
    second.output.weight.copy_(COPYING * EMBEDDING / group * _per_query(values, shape).T)
    wanted = SHARPNESS * words * slow.repeat(shape.kv_heads)[:, None]
    second.key.weight.copy_(wanted @ moved.T)
    second.query.weight.copy_(_per_query(wanted, shape))


def _per_query(weight: Tensor, shape: Shape) -> Tensor:
    """`weight`, `[kv_heads * head_dim, hidden]`, with each head repeated for the queries that share it."""
    by_head = weight.view(shape.kv_heads, shape.head_dim, -1)
    return by_head.repeat_interleave(shape.heads // shape.kv_heads, 0).flatten(0, 1)


class Block(nn.Module):
    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.attention_norm = nn.RMSNorm(shape.hidden, eps=1e-5)
        self.attention = Attention(shape)
        self.mlp_norm = nn.RMSNorm(shape.hidden, eps=1e-5)
        self.gate = nn.Linear(shape.hidden, shape.intermediate, bias=False)
        self.up = nn.Linear(shape.hidden, shape.intermediate, bias=False)
        self.down = nn.Linear(shape.intermediate, shape.hidden, bias=False)

    def forward(
        self, hidden: Tensor, turn: tuple[Tensor, Tensor], past: tuple[Tensor, Tensor] | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        attended, key, value = self.attention(self.attention_norm(hidden), turn, past)
        hidden = hidden + attended
        inner = self.mlp_norm(hidden)
        return hidden + self.down(F.silu(self.gate(inner)) * self.up(inner)), key, value


class Attention(nn.Module):
    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.shape = shape
        self.query = nn.Linear(shape.hidden, shape.heads * shape.head_dim)
        self.key = nn.Linear(shape.hidden, shape.kv_heads * shape.head_dim)
        self.value = nn.Linear(shape.hidden, shape.kv_heads * shape.head_dim, bias=False)
        self.output = nn.Linear(shape.heads * shape.head_dim, shape.hidden, bias=False)

    def forward(
        self, hidden: Tensor, turn: tuple[Tensor, Tensor], past: tuple[Tensor, Tensor] | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        batch, tokens, _ = hidden.shape
        query, key, value = (
            one(hidden).view(batch, tokens, -1, self.shape.head_dim).transpose(1, 2)
            for one in (self.query, self.key, self.value)
        )
        query, key = apply_rotary(query, turn), apply_rotary(key, turn)
        keys, values = (
            (key, value) if past is None else (torch.cat((past[0], key), 2), torch.cat((past[1], value), 2))
        )
        attended = self._attend(query, keys, values)
        return self.output(attended.transpose(1, 2).reshape(batch, tokens, -1)), key, value

    def _attend(self, query: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        group = self.shape.heads // self.shape.kv_heads
        keys, values = keys.repeat_interleave(group, 1), values.repeat_interleave(group, 1)
        new, total = query.shape[2], keys.shape[2]
        if new == total:
            return F.scaled_dot_product_attention(query, keys, values, is_causal=True)
        seen = torch.ones(new, total, dtype=torch.bool, device=query.device).tril(total - new)
        return F.scaled_dot_product_attention(query, keys, values, attn_mask=seen)


def apply_rotary(states: Tensor, turn: tuple[Tensor, Tensor]) -> Tensor:
    """`states`, `[..., tokens, head_dim]`, rotated to the positions of `turn`; halves form pairs (neox)."""
    cos, sin = turn
    first, second = states.chunk(2, dim=-1)
    turned = torch.cat((first * cos - second * sin, second * cos + first * sin), -1)
    return turned.to(states.dtype)
