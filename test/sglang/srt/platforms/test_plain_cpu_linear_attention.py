"""Gated delta nets in SGLang's slots compute what Transformers computes, whole or in parts."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from sglang.srt.platforms.plain_cpu.linear_attention import (
    GatedDeltaNetBackend,
    gate_attention,
    gated_norm,
    split_grouped_projections,
    split_projections,
)
from transformers import AutoConfig
from transformers.models.qwen3_5.modeling_qwen3_5 import Qwen3_5GatedDeltaNet, Qwen3_5RMSNormGated
from transformers.models.qwen3_next.modeling_qwen3_next import Qwen3NextGatedDeltaNet

K_HEADS, V_HEADS, K_DIM, V_DIM, WIDTH = 2, 4, 8, 16, 4
SLOTS = 6
HIDDEN = 32
ROWS = [3, 5]
"""Slots of two sequences."""


def config(kind: str) -> Any:
    heads = {"linear_num_key_heads": K_HEADS, "linear_num_value_heads": V_HEADS}
    dims = {"linear_key_head_dim": K_DIM, "linear_value_head_dim": V_DIM, "linear_conv_kernel_dim": WIDTH}
    return AutoConfig.for_model(kind, hidden_size=HIDDEN, num_hidden_layers=2, **heads, **dims)


def reference(kind: type, name: str) -> Any:
    torch.manual_seed(0)
    net = kind(config(name), layer_idx=0)
    with torch.no_grad():
        net.A_log.fill_(0.0)
        net.dt_bias.copy_(torch.linspace(-6, -2, V_HEADS))
        net.norm.weight.uniform_(0.5, 1.5)
    return net.eval()


class Net:
    """The layer `net` as SGLang drives it: projections, `GatedDeltaNetBackend`, norm and output."""

    def __init__(self, net: Qwen3_5GatedDeltaNet) -> None:
        self.net = net
        channels = 2 * K_HEADS * K_DIM + V_HEADS * V_DIM
        self.conv = torch.zeros(SLOTS, channels, WIDTH - 1)
        self.temporal = torch.zeros(SLOTS, V_HEADS, V_DIM, K_DIM)
        self.layer = SimpleNamespace(
            layer_id=0,
            q_dim=K_HEADS * K_DIM,
            k_dim=K_HEADS * K_DIM,
            v_dim=V_HEADS * V_DIM,
            num_k_heads=K_HEADS,
            num_v_heads=V_HEADS,
            conv_weights=net.conv1d.weight.squeeze(1),
            bias=None,
            A_log=net.A_log,
            dt_bias=net.dt_bias,
        )
        cache = SimpleNamespace(conv=[self.conv], temporal=self.temporal)
        self.backend: Any = GatedDeltaNetBackend.__new__(GatedDeltaNetBackend)
        self.backend.req_to_token_pool = SimpleNamespace(mamba2_layer_cache=lambda layer: cache)

    def forward(self, tokens: torch.Tensor, lengths: list[int], kept: list[tuple[int, int]] | None = None) -> Any:
        """`tokens` of the sequences, one after the other; `kept`: per sequence how far, and into which slot."""
        batch = SimpleNamespace(
            batch_size=len(lengths),
            extend_seq_lens=torch.tensor(lengths),
            mamba_track_mask=None if kept is None else torch.tensor([at > 0 for at, _ in kept]),
            mamba_track_aligned_lens=lambda: None if kept is None else torch.tensor([at for at, _ in kept]),
        )
        self.backend.forward_metadata = SimpleNamespace(
            mamba_cache_indices=torch.tensor(ROWS[: len(lengths)]),
            mamba_track_indices=None if kept is None else torch.tensor([slot for _, slot in kept]),
        )
        net, is_decode = self.net, kept is not None and lengths == [1] * len(lengths)
        run = self.backend.forward_decode if is_decode else self.backend.forward_extend
        qkvz = torch.cat([net.in_proj_qkv(tokens), net.in_proj_z(tokens)], dim=-1)
        ba = torch.cat([net.in_proj_b(tokens), net.in_proj_a(tokens)], dim=-1)
        qkv, z, b, a = split_projections(qkvz, ba, K_HEADS, V_HEADS, K_DIM, V_DIM)
        out = run(layer=self.layer, forward_batch=batch, mixed_qkv=qkv, a=a, b=b)
        norm = SimpleNamespace(weight=net.norm.weight, eps=net.layer_norm_epsilon, activation="swish")
        normed = gated_norm(norm, out.reshape(-1, V_DIM), z.reshape(-1, V_DIM))
        return net.out_proj(normed.reshape(len(tokens), -1))


@pytest.fixture
def net() -> Net:
    return Net(reference(Qwen3_5GatedDeltaNet, "qwen3_5_text"))


def expected(net: Net, tokens: torch.Tensor) -> torch.Tensor:
    return net.net(tokens[None])[0]


@torch.no_grad()
def test_two_sequences_at_once_are_as_one_by_one(net: Net) -> None:
    first, second = torch.randn(150, HIDDEN), torch.randn(3, HIDDEN)
    out = net.forward(torch.cat([first, second]), [150, 3])
    torch.testing.assert_close(out, torch.cat([expected(net, first), expected(net, second)]))
    assert net.temporal[ROWS].any(dim=(1, 2, 3)).all()
    assert not net.temporal[[0, 1, 2, 4]].any()


@torch.no_grad()
def test_a_sequence_goes_on_from_its_state(net: Net) -> None:
    tokens = torch.randn(203, HIDDEN)
    parts = [net.forward(tokens[:128], [128]), net.forward(tokens[128:201], [73])]
    parts += [net.forward(tokens[at : at + 1], [1], [(0, 0)]) for at in (201, 202)]
    torch.testing.assert_close(torch.cat(parts), expected(net, tokens), atol=1e-5, rtol=1e-4)


@torch.no_grad()
def test_the_state_in_the_middle_of_a_prompt_is_kept(net: Net) -> None:
    tokens = torch.randn(200, HIDDEN)
    whole = net.forward(tokens, [200], [(128, 1)])
    torch.testing.assert_close(whole, expected(net, tokens), atol=1e-5, rtol=1e-4)
    net.conv[ROWS[0]], net.temporal[ROWS[0]] = net.conv[1], net.temporal[1]
    again = net.forward(tokens[128:], [72])
    torch.testing.assert_close(again, whole[128:], atol=1e-5, rtol=1e-4)


@torch.no_grad()
def test_the_state_at_the_end_is_kept_too(net: Net) -> None:
    net.forward(torch.randn(64, HIDDEN), [64], [(64, 2)])
    assert net.temporal[2].equal(net.temporal[ROWS[0]])
    assert net.conv[2].equal(net.conv[ROWS[0]])


@torch.no_grad()
def test_a_decode_step_keeps_the_states_that_it_is_told_to(net: Net) -> None:
    net.forward(torch.randn(20, HIDDEN), [10, 10])
    net.forward(torch.randn(2, HIDDEN), [1, 1], [(0, 1), (1, 2)])
    assert net.temporal[2].equal(net.temporal[ROWS[1]])
    assert net.conv[2].equal(net.conv[ROWS[1]])
    assert not net.temporal[1].any()


@torch.no_grad()
def test_projections_that_lie_together_per_head_are_taken_apart() -> None:
    net = reference(Qwen3NextGatedDeltaNet, "qwen3_next")
    tokens = torch.randn(7, HIDDEN)
    qkvz, ba = net.in_proj_qkvz(tokens), net.in_proj_ba(tokens)
    qkv, z, b, a = split_grouped_projections(qkvz, ba, K_HEADS, V_HEADS, K_DIM, V_DIM)
    parts = net.fix_query_key_value_ordering(qkvz[None], ba[None])
    q, k, v, gate, strength, decay = (part[0].reshape(7, -1) for part in parts)
    assert qkv.equal(torch.cat([q, k, v], dim=-1))
    assert z.reshape(7, -1).equal(gate)
    assert b.equal(strength)
    assert a.equal(decay)


@torch.no_grad()
def test_gates_are_those_of_transformers() -> None:
    norm = Qwen3_5RMSNormGated(V_DIM, eps=1e-6)
    norm.weight.uniform_(0.5, 1.5)
    x, z = torch.randn(9, V_DIM), torch.randn(9, V_DIM)
    ours = SimpleNamespace(weight=norm.weight, eps=1e-6, activation="silu")
    torch.testing.assert_close(gated_norm(ours, x, z), norm(x, z))
    ours.activation = "sigmoid"
    plain = gated_norm(ours, x, torch.full_like(z, 100.0))
    torch.testing.assert_close(gated_norm(ours, x, z), plain * torch.sigmoid(z))
    heads = torch.randn(9, 2, V_DIM // 2)
    torch.testing.assert_close(gate_attention(x, heads), x * torch.sigmoid(heads.reshape(9, V_DIM)))
