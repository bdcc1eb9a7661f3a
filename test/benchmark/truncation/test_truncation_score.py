from __future__ import annotations

import numpy as np
import pytest
import torch

from benchmark.truncation.method import truncate_tokens
from benchmark.truncation.model import LanguageModel
from benchmark.truncation.plan import Plan
from benchmark.truncation.score import Resampling, predict


def test_predictions_are_those_of_the_next_token(model: LanguageModel) -> None:
    ids = np.random.default_rng(0).integers(0, model.shape.vocabulary, (20, 100))
    heard: list[int] = []
    said = predict(model, ids, Plan(64, 32, 8), truncate_tokens, heard.append)
    assert heard == [16, 4]
    assert said.losses.shape == said.best.shape == said.right.shape == said.truncations.shape == (20, 99)
    assert [int((said.truncations[0] == count).sum()) for count in range(3)] == [64, 32, 3]
    with torch.inference_mode():
        logits, _ = model(torch.from_numpy(ids[:, :64]), torch.arange(64))
    expected = -logits.log_softmax(-1)[5, 63, ids[5, 64]].item()
    assert said.losses[5, 63] == pytest.approx(expected, abs=1e-3)
    assert said.best[5, 63] == logits[5, 63].argmax()
    assert (said.right == (said.best == ids[:, 1:])).all()


def test_intervals_hold_the_truth_about_as_often_as_they_say() -> None:
    source = np.random.default_rng(0)
    hits = 0
    for trial in range(100):
        groups = np.repeat(np.arange(40), 3)
        values = (source.normal(2.0, 1.0, 40)[groups])[:, None] + source.normal(0.0, 0.1, (120, 5))
        one = Resampling(groups, trial, resamples=300).mean(values, np.ones(values.shape, dtype=bool))
        hits += one.low <= 2.0 <= one.high
        assert one.low <= one.value <= one.high
    assert 85 <= hits <= 100


def test_perplexity_and_its_ratio() -> None:
    losses = np.log(np.array([[2.0, 8.0, 99.0], [4.0, 4.0, 99.0]]))
    chosen = np.array([[True, True, False]] * 2)
    resampling = Resampling(np.array([0, 1]))
    assert resampling.perplexity(losses, chosen) == pytest.approx((4.0, 4.0, 4.0))
    ratio = resampling.perplexity_ratio(losses + np.log(1.5), losses, chosen)
    assert ratio == pytest.approx((1.5, 1.5, 1.5))
