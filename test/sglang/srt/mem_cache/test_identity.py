"""What the fingerprint reads of the weights."""

from __future__ import annotations

import pytest
import torch
from sglang.srt.mem_cache.cached_attention.identity import SAMPLES, weights_digest


def model(weight: torch.Tensor) -> torch.nn.Module:
    module = torch.nn.Module()
    module.register_buffer("weight", weight)
    return module


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float8_e4m3fn, torch.int64, torch.bool])
@pytest.mark.parametrize("shape", [(3, 5), (SAMPLES, 7)])
def test_a_weight_that_lies_transposed_has_the_digest_of_its_copy(
    dtype: torch.dtype, shape: tuple[int, int]
) -> None:
    weight = (torch.rand(shape, generator=torch.Generator().manual_seed(1)) * 10).to(dtype).t()
    assert not weight.is_contiguous()
    assert weights_digest(model(weight)) == weights_digest(model(weight.contiguous()))


def test_a_weight_that_changed_has_another() -> None:
    weight = torch.zeros(SAMPLES, 7)
    before = weights_digest(model(weight.t()))
    weight.fill_(1)
    assert weights_digest(model(weight.t())) != before


def test_numbers_without_a_shape_count() -> None:
    one, two = (weights_digest(model(torch.tensor(number))) for number in (1.0, 2.0))
    assert one != two
