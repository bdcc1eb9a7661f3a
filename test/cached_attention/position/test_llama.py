"""A real Llama goes on over a truncated cache: moved keys are as good as keys rotated where they now are."""

from __future__ import annotations

from copy import deepcopy

import pytest
import torch
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM

from cached_attention.position.delta_table import delta_table
from cached_attention.position.rotation import Rotation, rotate

SINK, DROPPED, LENGTH, NEW = 16, 48, 160, 12
"""Tokens: kept at the start, dropped after that, computed before the truncation, and computed after it."""


@pytest.fixture(params=["default", "llama3"])
def model(request: pytest.FixtureRequest) -> LlamaForCausalLM:
    scaling = {
        "default": {"rope_type": "default", "rope_theta": 10_000.0},
        "llama3": {
            "rope_type": "llama3",
            "rope_theta": 10_000.0,
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 64,
        },
    }[request.param]
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=512,
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        rope_parameters=scaling,
        initializer_range=0.1,
    )
    return LlamaForCausalLM(config).to(torch.bfloat16).eval()


def kept(states: torch.Tensor) -> torch.Tensor:
    """`[..., tokens, dim]` without the dropped tokens."""
    return torch.cat((states[..., :SINK, :], states[..., SINK + DROPPED :, :]), dim=-2)


def logits(
    model: LlamaForCausalLM, layers: list[tuple[torch.Tensor, torch.Tensor]], tokens: torch.Tensor
) -> torch.Tensor:
    """Of new tokens after a cache of `[1, heads, tokens, dim]` keys and values per layer."""
    cache = DynamicCache()
    for layer, (keys, values) in enumerate(layers):
        cache.update(keys, values, layer)
    first = layers[0][0].shape[-2]
    positions = torch.arange(first, first + tokens.shape[1]).unsqueeze(0)
    return model(tokens, past_key_values=cache, position_ids=positions).logits.float()


@torch.no_grad()
def test_moved_keys_answer_as_keys_that_are_rotated_afresh(model: LlamaForCausalLM) -> None:
    unrotated: list[torch.Tensor] = []
    for layer in model.model.layers:
        layer.self_attn.k_proj.register_forward_hook(lambda _module, _inputs, output: unrotated.append(output))
    tokens = torch.randint(0, 512, (1, LENGTH), generator=torch.Generator().manual_seed(1))
    new = torch.randint(0, 512, (1, NEW), generator=torch.Generator().manual_seed(2))
    cache = model(tokens, use_cache=True).past_key_values
    computed = [(layer.keys, layer.values) for layer in cache.layers]
    before_rope = [keys.view(1, LENGTH, 2, 32).transpose(1, 2) for keys in unrotated]
    rotation = Rotation(tuple(model.model.rotary_emb.inv_freq.double().tolist()))

    def rotated(keys: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        """`[1, heads, tokens, dim]` turned by so many positions each."""
        tables = delta_table(rotation, positions.tolist())
        return rotate(keys.transpose(1, 2), tables, rotation).transpose(1, 2)

    deltas = torch.zeros(LENGTH - DROPPED, dtype=torch.int64)
    deltas[SINK:] = -DROPPED
    moved = [(rotated(kept(keys), deltas), kept(values)) for keys, values in computed]
    places = torch.arange(LENGTH - DROPPED)
    afresh = [
        (rotated(kept(keys), places), kept(values))
        for keys, (_, values) in zip(before_rope, computed, strict=True)
    ]
    afresh32 = [
        (rotated(kept(keys).float(), places), kept(values).float())
        for keys, (_, values) in zip(before_rope, computed, strict=True)
    ]
    baked_in = [(kept(keys), kept(values)) for keys, values in computed]

    exact = logits(deepcopy(model).float(), afresh32, new)

    def error(cache: list[tuple[torch.Tensor, torch.Tensor]]) -> float:
        """Root mean square, of logits in bfloat16 against those in float32."""
        return (logits(model, cache, new) - exact).square().mean().sqrt().item()

    assert error(moved) < 1.5 * error(afresh)
    assert error(baked_in) > 5 * error(afresh), "the test notices wrong positions"
