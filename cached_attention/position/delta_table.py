"""Cosines and sines of the angles by which keys are turned on their way to another position."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch

from cached_attention.position.rotation import Rotation

NO_ROTATION = -1
"""Row of a page that stays at its base position: its bytes are copied as they are."""

ALIGNMENT = 4
"""Columns; compiled code reads 16 bytes of a row at once."""


def delta_table(rotation: Rotation, deltas: Sequence[int]) -> torch.Tensor:
    """`[len(deltas), rotary_dim]`, fp32: per delta (tokens, any sign) the cosines, then the sines.

    Computed in fp64. The attention factor of yarn (mscale) is left out: stored keys carry it already.
    """
    positions = torch.tensor(deltas, dtype=torch.float64).reshape(-1, 1)
    angles = positions * torch.tensor(rotation.inv_freq, dtype=torch.float64)
    return torch.cat((angles.cos(), angles.sin()), dim=-1).float()


def rows_of(deltas: Sequence[int]) -> tuple[list[int], list[int]]:
    """Per page the row of its delta, `NO_ROTATION` where it is 0; and the deltas of the rows, each once."""
    distinct = dict.fromkeys(delta for delta in deltas if delta)
    row = {delta: i for i, delta in enumerate(distinct)}
    return [row.get(delta, NO_ROTATION) for delta in deltas], list(distinct)


class DeltaTables:
    """The tables of all rotations of a model in one, side by side.

    Most models have one rotation; some turn the keys of some layers with another base.
    """

    def __init__(self, rotations: Iterable[Rotation]) -> None:
        self._first_column: dict[Rotation, int] = {}
        self.width = 0
        """Columns of the joint table, those between the rotations' own included."""
        for rotation in rotations:
            if rotation not in self._first_column:
                self._first_column[rotation] = self.width
                self.width += -(-rotation.rotary_dim // ALIGNMENT) * ALIGNMENT

    def first_column(self, rotation: Rotation) -> int:
        """Where the `rotary_dim` columns of `rotation` begin."""
        return self._first_column[rotation]

    def build(self, deltas: Sequence[int]) -> torch.Tensor:
        """`[len(deltas), width]`, fp32."""
        joint = torch.zeros(len(deltas), self.width)
        for rotation, first in self._first_column.items():
            joint[:, first : first + rotation.rotary_dim] = delta_table(rotation, deltas)
        return joint
