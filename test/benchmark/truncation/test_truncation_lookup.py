from __future__ import annotations

import torch

from benchmark.truncation.model import LanguageModel, Shape


def test_a_new_model_copies_what_it_has_seen_at_any_distance() -> None:
    torch.manual_seed(0)
    shape = Shape(
        vocabulary=1_024, hidden=128, intermediate=344, layers=3, heads=2, kv_heads=2, head_dim=64, window=256
    )
    tokens = torch.stack([torch.randperm(1_024)[:128] for _ in range(4)]).repeat(1, 2)
    with torch.no_grad():
        logits, _ = LanguageModel(shape)(tokens[:, :-1], torch.arange(255))
    right = logits.argmax(-1) == tokens[:, 1:]
    # By chance, one of 1,024.
    assert right[:, 128:].float().mean() > 0.3
    assert right[:, :127].float().mean() < 0.05
