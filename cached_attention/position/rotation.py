"""How a model's RoPE rotates a key, and the same rotation in torch."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from math import isfinite

import torch


class Pairing(Enum):
    """Which two elements of the rotated slice form pair i of n."""

    HALVES = "halves"
    """i and i + n: GPT-NeoX, Llama, Qwen."""
    INTERLEAVED = "interleaved"
    """2i and 2i + 1: GPT-J, DeepSeek."""


@dataclass(frozen=True)
class Rotation:
    """The RoPE of one layer's keys. RoPE composes: R(p + d) = R(d) R(p) (Su et al., RoFormer, section 3.4).

    Args:
        inv_freq: radians per token, one per pair, with scaling (linear, llama3, yarn). Exactly the model's own
            values, so that this rotation continues the model's.
        pairing: which elements form a pair.
        start: first rotated element of a head's vector; 0 except where the rotated part comes last (MLA).

    Raises:
        ValueError: no frequency, one that is not finite, or a negative start.
    """

    inv_freq: tuple[float, ...]
    pairing: Pairing = Pairing.HALVES
    start: int = 0

    def __post_init__(self) -> None:
        if not self.inv_freq or not all(map(isfinite, self.inv_freq)):
            raise ValueError(f"A rotation needs finite frequencies, at least one; got {self.inv_freq!r}.")
        if self.start < 0:
            raise ValueError(f"A rotation starts at element 0 or later of the head; got {self.start}.")

    @property
    def rotary_dim(self) -> int:
        """Elements of a head's vector that are rotated."""
        return 2 * len(self.inv_freq)

    @property
    def stop(self) -> int:
        """One past the last rotated element."""
        return self.start + self.rotary_dim

    def geometry(self) -> tuple[int, int, int]:
        """Arguments for compiled code: first element, number of pairs, 1 if they are interleaved."""
        return self.start, len(self.inv_freq), int(self.pairing is Pairing.INTERLEAVED)

    def pairs(self, keys: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Views of the first and second elements of all pairs, each `[..., rotary_dim / 2]`."""
        rotated = keys[..., self.start : self.stop]
        if self.pairing is Pairing.HALVES:
            first, second = rotated.chunk(2, dim=-1)
            return first, second
        return rotated[..., 0::2], rotated[..., 1::2]


def rotate(keys: torch.Tensor, cos_sin: torch.Tensor, rotation: Rotation) -> torch.Tensor:
    """`keys` rotated further, as a new tensor of the same dtype.

    Reference for the kernels, to the bit: each product and each sum is rounded to fp32, the result to the nearest
    value of the keys' dtype, ties to even.

    Args:
        keys: `[..., heads, dim]`, floating point, already rotated at some position.
        cos_sin: `[..., rotary_dim]`, fp32: rows of `delta_table`, broadcast over the heads.

    Raises:
        ValueError: the rotated slice does not fit into `dim`, or the table belongs to another rotation.
    """
    if rotation.stop > keys.shape[-1] or cos_sin.shape[-1] != rotation.rotary_dim:
        raise ValueError(
            f"Elements {rotation.start} to {rotation.stop} are to be rotated with a table of {cos_sin.shape[-1]} "
            f"columns, but a key has {keys.shape[-1]} elements and the rotation {rotation.rotary_dim}."
        )
    cos, sin = cos_sin.unsqueeze(-2).chunk(2, dim=-1)
    first, second = (part.float() for part in rotation.pairs(keys))
    turned = keys.clone()
    turned_first, turned_second = rotation.pairs(turned)
    turned_first.copy_(first * cos - second * sin)
    turned_second.copy_(second * cos + first * sin)
    return turned
