"""How well a method predicts held-out text, with confidence intervals."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from benchmark.truncation.method import Method
from benchmark.truncation.model import LanguageModel
from benchmark.truncation.plan import Plan

RESAMPLES = 2_000
BATCH = 16


class Interval(NamedTuple):
    """An estimate and its 95% confidence interval."""

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class Predictions:
    """Prediction of each next token; all `[conversations, tokens - 1]`."""

    truncations: np.ndarray
    """Truncations before the token was predicted, int64."""
    losses: np.ndarray
    """Nats, float64."""
    best: np.ndarray
    """The most likely token, int64."""
    right: np.ndarray
    """Whether that was the next token, bool."""


@torch.inference_mode()
def predict(
    model: LanguageModel, conversations: np.ndarray, plan: Plan, method: Method, done: Callable[[int], object]
) -> Predictions:
    """Predict every token after the first; `done` is called with the number of conversations of each batch."""
    device = next(model.parameters()).device
    parts = []
    for start in range(0, len(conversations), BATCH):
        batch = torch.from_numpy(conversations[start : start + BATCH]).to(device)
        parts.append(_predict_batch(model, batch, plan, method))
        done(len(batch))
    truncations, losses, best, right = (torch.cat(part).cpu().numpy() for part in zip(*parts, strict=True))
    return Predictions(truncations, losses, best, right)


def _predict_batch(model: LanguageModel, ids: Tensor, plan: Plan, method: Method) -> tuple[Tensor, ...]:
    truncations, losses, best = [], [], []
    for period, logits in method(model, ids, plan):
        following = ids[:, period.start + 1 : period.end + 1]
        known = logits[:, : following.shape[1]]
        truncations.append(torch.full_like(following, period.truncations))
        losses.append(F.cross_entropy(known.transpose(1, 2), following, reduction="none").double())
        best.append(known.argmax(-1))
    chosen = torch.cat(best, 1)
    return torch.cat(truncations, 1), torch.cat(losses, 1), chosen, chosen == ids[:, 1:]


class Resampling:
    """Bootstrap over `groups`, one per conversation: conversations from one document are drawn together."""

    def __init__(self, groups: np.ndarray, seed: int = 0, resamples: int = RESAMPLES) -> None:
        _, self._group = np.unique(groups, return_inverse=True)
        count = int(self._group.max()) + 1
        self._draws = np.random.default_rng(seed).multinomial(count, np.full(count, 1 / count), resamples)

    def mean(
        self, values: np.ndarray, chosen: np.ndarray, then: Callable[[np.ndarray], np.ndarray] = np.asarray
    ) -> Interval:
        """Interval of `then(mean)` over the `chosen` of `values`, both `[conversations, ...]`."""
        return self._interval(then(self._means(values, chosen)))

    def perplexity(self, losses: np.ndarray, chosen: np.ndarray) -> Interval:
        return self.mean(losses, chosen, np.exp)

    def perplexity_ratio(self, losses: np.ndarray, reference: np.ndarray, chosen: np.ndarray) -> Interval:
        """Ratio of two methods' perplexities on the same tokens; paired, so narrower than each of them."""
        return self.mean(losses - reference, chosen, np.exp)

    def _means(self, values: np.ndarray, chosen: np.ndarray) -> np.ndarray:
        """Mean over everything, then over each resample."""
        sums, counts = self._by_group(values * chosen), self._by_group(chosen.astype(np.float64))
        draws = np.vstack((np.ones_like(self._draws[:1]), self._draws))
        with np.errstate(invalid="ignore"):
            return (draws @ sums) / (draws @ counts)

    def _by_group(self, values: np.ndarray) -> np.ndarray:
        return np.bincount(self._group, values.reshape(len(values), -1).sum(1))

    @staticmethod
    def _interval(values: np.ndarray) -> Interval:
        low, high = np.nanpercentile(values[1:], (2.5, 97.5))
        return Interval(float(values[0]), float(low), float(high))
