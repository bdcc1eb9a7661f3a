from __future__ import annotations

import pytest
import torch

from benchmark.truncation.method import METHODS, KeptCache, Method, leave_keys, truncate_tokens, turn_keys
from benchmark.truncation.model import Cache, LanguageModel
from benchmark.truncation.plan import Plan
from cached_attention.position.rotation import Rotation

PLAN = Plan(window=64, step=32, sink=8)


def assert_close(one: torch.Tensor, other: torch.Tensor) -> None:
    torch.testing.assert_close(one, other, atol=2e-4, rtol=1e-4)


@pytest.fixture(scope="module")
def ids(model: LanguageModel) -> torch.Tensor:
    return torch.randint(model.shape.vocabulary, (2, 200), generator=torch.Generator().manual_seed(1))


def logits(method: Method, model: LanguageModel, ids: torch.Tensor, plan: Plan = PLAN) -> list[torch.Tensor]:
    """Per number of truncations."""
    with torch.inference_mode():
        return [part for _, part in method(model, ids, plan)]


def test_all_methods_are_equal_until_the_first_truncation(model: LanguageModel, ids: torch.Tensor) -> None:
    expected = logits(truncate_tokens, model, ids)[0]
    for name, method in METHODS.items():
        assert torch.equal(logits(method, model, ids)[0], expected), name


def test_methods_differ_from_the_first_truncation_on(model: LanguageModel, ids: torch.Tensor) -> None:
    read = {name: logits(method, model, ids)[1] for name, method in METHODS.items()}
    names = list(read)
    for i, first in enumerate(names):
        for second in names[i + 1 :]:
            assert (read[first] - read[second]).abs().max() > 1e-2, (first, second)


def test_truncated_tokens_are_read_as_if_nothing_had_been_before_them(
    model: LanguageModel, ids: torch.Tensor
) -> None:
    parts = logits(truncate_tokens, model, ids)
    assert [part.shape[1] for part in parts] == [64, 32, 32, 32, 32, 8]
    for count, part in enumerate(parts):
        end = min(64 + 32 * count, 200)
        text = torch.cat((ids[:, :8], ids[:, 8 + 32 * count : end]), 1)
        alone = logits(truncate_tokens, model, text, Plan(window=64, step=32, sink=0))[0]
        assert_close(part, alone[:, -part.shape[1] :])


def test_one_layer_turned_is_one_layer_computed_again(ids: torch.Tensor, model: LanguageModel) -> None:
    """In the first layer keys depend on their token and place alone: CA must then be TT, over all truncations."""
    shallow = LanguageModel(model.shape)
    shallow.load_state_dict(model.state_dict())
    shallow.blocks = shallow.blocks[:1]
    for turned, again in zip(logits(turn_keys, shallow, ids), logits(truncate_tokens, shallow, ids), strict=True):
        assert_close(turned, again)
    left = logits(leave_keys, shallow, ids)[1]
    assert (left - logits(truncate_tokens, shallow, ids)[1]).abs().max() > 1e-2


def test_without_a_sink_a_turn_of_everything_changes_nothing(model: LanguageModel, ids: torch.Tensor) -> None:
    """Attention sees distances only: without a sink, CA is the same as going on without moving at all."""
    for turned, unmoved in zip(
        logits(METHODS["CA, no sink"], model, ids), unmoved_logits(model, ids, 64, 32), strict=True
    ):
        assert_close(turned, unmoved)


def unmoved_logits(model: LanguageModel, ids: torch.Tensor, window: int, step: int) -> list[torch.Tensor]:
    parts, past = [], None
    for period in Plan(window, step, 0).periods(ids.shape[1]):
        past = past.without(0, step) if past is not None else None
        with torch.inference_mode():
            part, new = model(ids[:, period.start : period.end], torch.arange(period.start, period.end), past)
        past = new if past is None else past.followed_by(new)
        parts.append(part)
    return parts


def test_reading_in_pieces_is_reading_at_once(model: LanguageModel, ids: torch.Tensor) -> None:
    with torch.inference_mode():
        whole, cache = model(ids[:, :100], torch.arange(100))
        _, past = model(ids[:, :70], torch.arange(70))
        rest, new = model(ids[:, 70:100], torch.arange(70, 100), past)
    assert_close(rest, whole[:, 70:])
    assert_close(past.followed_by(new).keys, cache.keys)


def test_kept_keys_that_do_not_move_are_exact_and_are_never_turned_in_place(model: LanguageModel) -> None:
    rotation = Rotation(tuple(model.shape.inverse_frequencies.tolist()))
    source = torch.Generator().manual_seed(2)
    keys = torch.randn(3, 2, 2, 24, 16, generator=source)
    kept = KeptCache(Cache(keys, torch.randn(keys.shape, generator=source)), torch.arange(24))
    original = keys.clone()
    assert torch.equal(kept.at(torch.arange(24), rotation).keys, original)
    moved = kept.at(torch.arange(24) - 16, rotation)
    assert not torch.equal(moved.keys, original)
    assert torch.equal(kept.cache.keys, original)
    assert torch.equal(moved.values, kept.cache.values)


def test_turned_keys_are_keys_computed_there(model: LanguageModel, ids: torch.Tensor) -> None:
    rotation = Rotation(tuple(model.shape.inverse_frequencies.tolist()))
    with torch.inference_mode():
        _, here = model(ids[:, :40], torch.arange(100, 140))
        _, there = model(ids[:, :40], torch.arange(3, 43))
    turned = KeptCache(here, torch.arange(100, 140)).at(torch.arange(3, 43), rotation)
    assert_close(turned.keys, there.keys)
    assert_close(turned.values, there.values)
