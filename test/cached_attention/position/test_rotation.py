"""Rotation in torch: composes, is exact where it must be, and refuses what makes no sense."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cached_attention.position.delta_table import NO_ROTATION, DeltaTables, delta_table, rows_of
from cached_attention.position.rotation import Pairing, Rotation, rotate


def inv_freq(dim: int, base: float = 1e4) -> tuple[float, ...]:
    return tuple(base ** (-i / dim) for i in range(0, dim, 2))


def as_complex(keys: torch.Tensor, rotation: Rotation) -> torch.Tensor:
    first, second = (part.double() for part in rotation.pairs(keys))
    return torch.complex(first, second)


@pytest.mark.parametrize("pairing", Pairing)
@pytest.mark.parametrize(("dim", "rotary_dim", "start"), [(64, 64, 0), (80, 32, 0), (576, 64, 512)])
@settings(deadline=None, max_examples=40)
@given(delta=st.integers(-(10**6), 10**6))
def test_a_pair_turns_by_its_frequency_times_the_delta(
    pairing: Pairing, dim: int, rotary_dim: int, start: int, delta: int
) -> None:
    rotation = Rotation(inv_freq(rotary_dim), pairing, start)
    keys = torch.randn(2, 3, dim, generator=torch.Generator().manual_seed(0))
    turned = rotate(keys, delta_table(rotation, [delta]), rotation)

    angle = delta * torch.tensor(rotation.inv_freq, dtype=torch.float64)
    expected = as_complex(keys, rotation) * torch.polar(torch.ones_like(angle), angle)
    torch.testing.assert_close(as_complex(turned, rotation), expected, atol=1e-6, rtol=1e-6)
    assert torch.equal(turned[..., :start], keys[..., :start])
    assert torch.equal(turned[..., rotation.stop :], keys[..., rotation.stop :])


def test_rows_differ_per_token_and_are_shared_by_its_heads() -> None:
    rotation = Rotation(inv_freq(16))
    keys = torch.randn(4, 1, 16).expand(4, 3, 16)
    turned = rotate(keys, delta_table(rotation, [0, 1, 5, -5]), rotation)
    assert torch.equal(turned[0], keys[0])
    assert torch.equal(turned[:, 0], turned[:, 2])
    assert not torch.equal(turned[1], keys[1])


def test_the_table_is_computed_in_fp64() -> None:
    rotation = Rotation((1.0, 1e-4))
    row = delta_table(rotation, [999_983])[0].tolist()
    exact = [f(999_983 * w) for f in (math.cos, math.sin) for w in rotation.inv_freq]
    assert row == torch.tensor(exact, dtype=torch.float64).float().tolist()


def test_a_page_at_its_base_position_has_no_row() -> None:
    assert rows_of([0, -4, 0, 7, -4]) == ([NO_ROTATION, 0, NO_ROTATION, 1, 0], [-4, 7])
    assert rows_of([]) == ([], [])


def test_tables_of_several_rotations_lie_side_by_side() -> None:
    local, whole = Rotation(inv_freq(6)), Rotation(inv_freq(16, 1e6))
    tables = DeltaTables([whole, local, whole, local])
    joint = tables.build([3, -2])
    assert joint.shape == (2, tables.width) == (2, 24)
    for rotation in (local, whole):
        first = tables.first_column(rotation)
        assert torch.equal(joint[:, first : first + rotation.rotary_dim], delta_table(rotation, [3, -2]))
    assert DeltaTables([]).build([1]).shape == (1, 0)


def test_refuses_what_is_no_rotation() -> None:
    with pytest.raises(ValueError, match="finite"):
        Rotation(())
    with pytest.raises(ValueError, match="finite"):
        Rotation((1.0, math.nan))
    with pytest.raises(ValueError, match="element 0"):
        Rotation((1.0,), start=-1)
    with pytest.raises(ValueError, match="8 elements"):
        rotate(torch.zeros(1, 1, 8), torch.zeros(1, 16), Rotation(inv_freq(16)))
