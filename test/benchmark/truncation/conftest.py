from __future__ import annotations

import pytest
import torch

from benchmark.truncation.model import LanguageModel, Shape


@pytest.fixture(scope="session")
def model() -> LanguageModel:
    """A model whose attention is sharp enough that the place of a key decides the output."""
    torch.manual_seed(3)
    made = LanguageModel(
        Shape(vocabulary=96, hidden=48, intermediate=96, layers=3, heads=4, kv_heads=2, head_dim=16, window=128)
    )
    with torch.no_grad():
        for name, weight in made.named_parameters():
            if weight.dim() == 2:
                gain = 2.0 if name.endswith(("query.weight", "key.weight")) else 1.0
                weight.normal_(0.0, gain * weight.shape[-1] ** -0.5)
        made.embedding.weight.normal_(0.0, 1.0)
    return made.eval()
