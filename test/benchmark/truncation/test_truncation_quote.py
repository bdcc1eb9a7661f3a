from __future__ import annotations

import numpy as np

from benchmark.truncation.quote import SHORTEST, quoting


def test_much_of_the_later_text_was_there_before_and_the_rest_is_unchanged() -> None:
    text = np.arange(512)
    written = quoting(text, np.random.default_rng(0))
    copied = np.flatnonzero(written != text)
    assert 0.35 < len(copied) / len(text) < 0.65
    assert (written[copied] < copied).all()
    assert (written > 0).sum() == len(text) - 1
    assert text[-1] == len(text) - 1


def test_quotes_reach_back_to_any_distance() -> None:
    source = np.random.default_rng(1)
    distances = np.concatenate([np.arange(256) - quoting(np.arange(256), source) for _ in range(50)])
    assert np.histogram(distances[distances > 0], (SHORTEST, 64, 128, 192, 256))[0].all()
