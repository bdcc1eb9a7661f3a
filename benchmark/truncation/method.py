"""Ways to continue when the window is full.

TT drops tokens and recomputes all others. CA (CachedAttention) keeps keys and values as they were computed and
rotates the keys to their new positions. NKVT keeps them too, with their old positions baked in.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from benchmark.truncation.model import Cache, LanguageModel
from benchmark.truncation.plan import Period, Plan
from cached_attention.position.delta_table import delta_table
from cached_attention.position.rotation import Rotation, rotate

Reading = Iterator[tuple[Period, Tensor]]
"""Per period, the logits after each of its tokens, `[conversations, tokens, vocabulary]`."""
Method = Callable[[LanguageModel, Tensor, Plan], Reading]
"""Reads conversations, `[conversations, tokens]`, int64, truncated by a plan."""


def truncate_tokens(model: LanguageModel, ids: Tensor, plan: Plan) -> Reading:
    """TT: all remaining tokens are recomputed after each truncation."""
    return _compute_again(model, ids, plan, plan.window)


def use_full_context(model: LanguageModel, ids: Tensor, plan: Plan) -> Reading:
    """The ceiling: as much of the conversation as the model was trained to read, recomputed at every step."""
    return _compute_again(model, ids, plan, model.shape.window)


def turn_keys(model: LanguageModel, ids: Tensor, plan: Plan) -> Reading:
    """CA: nothing is recomputed, kept keys are rotated to their new positions."""
    return _keep_cache(model, ids, plan, turned=True)


def leave_keys(model: LanguageModel, ids: Tensor, plan: Plan) -> Reading:
    """NKVT: nothing is recomputed, kept keys stay at their old positions, new tokens take the freed ones."""
    return _keep_cache(model, ids, plan, turned=False)


def without_sink(method: Method) -> Method:
    """`method` that keeps only the most recent tokens."""
    return lambda model, ids, plan: method(model, ids, replace(plan, sink=0))


METHODS: dict[str, Method] = {
    "full context": use_full_context,
    "TT": truncate_tokens,
    "CA": turn_keys,
    "TT, no sink": without_sink(truncate_tokens),
    "CA, no sink": without_sink(turn_keys),
    "NKVT": leave_keys,
}
REFERENCE = "TT"


@dataclass(frozen=True)
class KeptCache:
    """Keys and values as computed, and their positions then: `computed_at`, `[tokens]`. Never rotated."""

    cache: Cache
    computed_at: Tensor

    def followed_by(self, cache: Cache, computed_at: Tensor) -> KeptCache:
        return KeptCache(self.cache.followed_by(cache), torch.cat((self.computed_at, computed_at)))

    def without(self, start: int, end: int) -> KeptCache:
        return KeptCache(
            self.cache.without(start, end), torch.cat((self.computed_at[:start], self.computed_at[end:]))
        )

    def at(self, positions: Tensor, rotation: Rotation) -> Cache:
        """The cache with each key rotated from where it was computed to `positions`, `[tokens]`."""
        deltas, row = (positions - self.computed_at).unique(return_inverse=True)
        table = delta_table(rotation, deltas.tolist()).to(self.cache.keys.device)
        by_token = self.cache.keys.transpose(2, 3)
        return Cache(rotate(by_token, table[row], rotation).transpose(2, 3), self.cache.values)


def _compute_again(model: LanguageModel, ids: Tensor, plan: Plan, longest: int) -> Reading:
    for period in plan.periods(ids.shape[1]):
        dropped = max(0, plan.window + period.dropped - longest)
        seen = torch.cat((ids[:, : plan.sink], ids[:, plan.sink + dropped : period.end]), 1)
        logits, _ = model(seen, torch.arange(seen.shape[1], device=ids.device))
        yield period, logits[:, period.start - period.end :]


def _keep_cache(model: LanguageModel, ids: Tensor, plan: Plan, turned: bool) -> Reading:
    rotation = Rotation(tuple(model.shape.inverse_frequencies.tolist()))
    kept: KeptCache | None = None
    for period in plan.periods(ids.shape[1]):
        past = None
        if kept is not None:
            kept = kept.without(plan.sink, plan.sink + plan.step)
            now = torch.arange(kept.cache.tokens, device=ids.device)
            past = kept.at(now, rotation) if turned else kept.cache
        positions = torch.arange(period.start, period.end, device=ids.device) - period.dropped
        logits, new = model(ids[:, period.start : period.end], positions, past)
        kept = KeptCache(new, positions) if kept is None else kept.followed_by(new, positions)
        yield period, logits
