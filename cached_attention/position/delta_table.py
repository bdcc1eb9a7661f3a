"""Cosine and sine tables for rotating keys to another position."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch

from cached_attention.position.rotation import Rotation

NO_ROTATION = -1
"""Row of a page that stays at its base position: its bytes are copied unchanged."""

ALIGNMENT = 4
"""Columns; compiled code reads 16 bytes of a row at a time."""


def delta_table(rotation: Rotation, deltas: Sequence[int]) -> torch.Tensor:
    """`[len(deltas), rotary_dim]`, fp32: per delta (tokens, any sign) the cosines, then the sines.

    Computed in fp64. YaRN's attention factor (mscale) is left out: stored keys already include it.
    """
    positions = torch.tensor(deltas, dtype=torch.float64).reshape(-1, 1)
    angles = positions * torch.tensor(rotation.inv_freq, dtype=torch.float64)
    return torch.cat((angles.cos(), angles.sin()), dim=-1).float()


def rows_of(deltas: Sequence[int]) -> tuple[list[int], list[int]]:
    """Row of each page's delta, `NO_ROTATION` if it is 0; and the distinct deltas, in the order of their rows."""
    distinct = dict.fromkeys(delta for delta in deltas if delta)
    row = {delta: i for i, delta in enumerate(distinct)}
    return [row.get(delta, NO_ROTATION) for delta in deltas], list(distinct)


class DeltaTables:
    """Tables of all of a model's rotations, side by side in one table.

    Most models have one rotation; some use another base in some layers.
    """

    def __init__(self, rotations: Iterable[Rotation]) -> None:
        self._first_column: dict[Rotation, int] = {}
        self.width = 0
        """Columns of the joint table, including padding between rotations."""
        for rotation in rotations:
            if rotation not in self._first_column:
                self._first_column[rotation] = self.width
                self.width += -(-rotation.rotary_dim // ALIGNMENT) * ALIGNMENT

    def first_column(self, rotation: Rotation) -> int:
        """First of the `rotary_dim` columns of `rotation`."""
        return self._first_column[rotation]

    def build(self, deltas: Sequence[int]) -> torch.Tensor:
        """`[len(deltas), width]`, fp32."""
        joint = torch.zeros(len(deltas), self.width)
        for rotation, first in self._first_column.items():
            joint[:, first : first + rotation.rotary_dim] = delta_table(rotation, deltas)
        return joint
