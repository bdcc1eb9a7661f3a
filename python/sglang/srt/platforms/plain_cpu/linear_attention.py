"""Gated delta nets on a CPU (Qwen3-Next, Qwen3.5), with the recurrences from Transformers."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from sglang.srt.layers.attention.hybrid_linear_attn_backend import HybridLinearAttnBackend, MambaAttnBackendBase
from sglang.srt.plugins.hook_registry import HookRegistry, HookType
from torch.nn.functional import conv1d, silu, softplus
from transformers.models.qwen3_5.modeling_qwen3_5 import (
    torch_chunk_gated_delta_rule,
    torch_recurrent_gated_delta_rule,
)

if TYPE_CHECKING:
    from sglang.srt.layers.radix_linear_attention import RadixLinearAttention
    from sglang.srt.model_executor.forward_batch_info import ForwardBatch

KERNELS = "sglang.kernels.ops.attention.fla"
MODELS = "sglang.srt.models"
DeltaRule = Callable[..., tuple[torch.Tensor, torch.Tensor]]


def hybrid_backend(model_runner: Any, attention: Any, attention_layers: list[int]) -> HybridLinearAttnBackend:
    """`attention` for the layers `attention_layers`, and gated delta nets for the others."""
    _replace_kernels()
    return HybridLinearAttnBackend(attention, GatedDeltaNetBackend(model_runner), attention_layers)


def _replace_kernels() -> None:
    """Replace the kernels around the recurrence. Only the module of the served model is loaded."""
    for norm in ("fused_norm_gate.FusedRMSNormGated", "layernorm_gated.RMSNorm"):
        HookRegistry.register(f"{KERNELS}.{norm}.forward", gated_norm, HookType.REPLACE)
    if f"{MODELS}.qwen3_5" in sys.modules:
        split = f"{MODELS}.qwen3_5.fused_qkvzba_split_reshape_cat_contiguous"
        HookRegistry.register(split, split_projections, HookType.REPLACE)
        HookRegistry.register(f"{MODELS}.qwen3_5.fused_sigmoid_mul", gate_attention, HookType.REPLACE)
    if f"{MODELS}.qwen3_next" in sys.modules:
        split = f"{MODELS}.qwen3_next.fused_qkvzba_split_reshape_cat"
        HookRegistry.register(split, split_grouped_projections, HookType.REPLACE)
    if not torch.cuda.is_available():
        # The scheduler pins tensors about states without checking whether there is a device to pin for.
        HookRegistry.register("torch.Tensor.pin_memory", lambda tensor: tensor, HookType.REPLACE)
    HookRegistry.apply_hooks()


def gated_norm(norm: Any, x: torch.Tensor, z: torch.Tensor, **_: Any) -> torch.Tensor:
    """RMS norm of the rows of `x`, times the activation of `z`."""
    wide = x.float()
    scaled = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + norm.eps) * norm.weight.float()
    gate = torch.sigmoid(z.float()) if norm.activation == "sigmoid" else silu(z.float())
    return (scaled * gate).to(x.dtype)


def gate_attention(
    attn_output: torch.Tensor, gate: torch.Tensor, inplace: bool = False, quant: bool = False
) -> torch.Tensor:
    """`attn_output` `[tokens, heads * dim]` times the sigmoid of `gate`, `[tokens, heads, dim]` or the same."""
    return attn_output * torch.sigmoid(gate.reshape(attn_output.shape))


def split_projections(
    mixed_qkvz: torch.Tensor, mixed_ba: torch.Tensor, k_heads: int, v_heads: int, k_dim: int, v_dim: int
) -> tuple[torch.Tensor, ...]:
    """q, k and v `[tokens, all dims]`, z `[tokens, v heads, dim]`, b and a `[tokens, v heads]`.

    `mixed_qkvz` holds all of q, then k, v and z; `mixed_ba` holds b, then a.
    """
    qkv, z = mixed_qkvz.split([2 * k_heads * k_dim + v_heads * v_dim, v_heads * v_dim], dim=-1)
    b, a = mixed_ba.chunk(2, dim=-1)
    return qkv, z.reshape(-1, v_heads, v_dim), b, a


def split_grouped_projections(
    mixed_qkvz: torch.Tensor, mixed_ba: torch.Tensor, k_heads: int, v_heads: int, k_dim: int, v_dim: int
) -> tuple[torch.Tensor, ...]:
    """Like `split_projections`, but q, k, v and z, and b and a, are grouped by k head."""
    tokens, group = len(mixed_qkvz), v_heads // k_heads
    widths = [k_dim, k_dim, group * v_dim, group * v_dim]
    *qkv, z = mixed_qkvz.view(tokens, k_heads, -1).split(widths, dim=-1)
    b, a = mixed_ba.view(tokens, k_heads, -1).chunk(2, dim=-1)
    joined = torch.cat([part.reshape(tokens, -1) for part in qkv], dim=-1)
    return joined, z.reshape(tokens, v_heads, v_dim), b.reshape(tokens, -1), a.reshape(tokens, -1)


class Stretch(NamedTuple):
    """Consecutive new tokens of a sequence, from the state in `slot` to the one stored in the slots `written`."""

    length: int
    slot: int
    written: Sequence[int]


class GatedDeltaNetBackend(MambaAttnBackendBase):
    """Reads and writes SGLang's slots: convolutions `[channels, width - 1]`, recurrences `[v heads, v, k]`."""

    needs_cpu_seq_lens = False

    def __init__(self, model_runner: Any) -> None:
        super().__init__(model_runner)
        self.conv_states_shape = self.req_to_token_pool.mamba_pool.mamba_cache.conv[0].shape

    def forward_decode(
        self,
        layer: RadixLinearAttention,
        forward_batch: ForwardBatch,
        mixed_qkv: torch.Tensor,
        a: torch.Tensor,
        b: torch.Tensor,
        **_: Any,
    ) -> torch.Tensor:
        """One token of each of `[requests]` sequences."""
        cache = self.req_to_token_pool.mamba2_layer_cache(layer.layer_id)
        slots = self.forward_metadata.mamba_cache_indices.long()
        inputs, conv = _convolve(layer, mixed_qkv[:, :, None], cache.conv[0][slots])
        cache.conv[0][slots] = conv.to(cache.conv[0].dtype)
        qkv = inputs.transpose(1, 2)
        before = cache.temporal[slots]
        out, state = _attend(torch_recurrent_gated_delta_rule, layer, qkv, a[:, None], b[:, None], before)
        cache.temporal[slots] = state.to(cache.temporal.dtype)
        if (tracked := forward_batch.mamba_track_mask) is not None and tracked.any():
            kept = self.forward_metadata.mamba_track_indices[tracked]
            cache.conv[0][kept] = cache.conv[0][slots[tracked]]
            cache.temporal[kept] = cache.temporal[slots[tracked]]
        return out

    def forward_extend(
        self,
        layer: RadixLinearAttention,
        forward_batch: ForwardBatch,
        mixed_qkv: torch.Tensor,
        a: torch.Tensor,
        b: torch.Tensor,
        **_: Any,
    ) -> torch.Tensor:
        """New tokens of each sequence: `[all tokens]`, one sequence after another."""
        cache = self.req_to_token_pool.mamba2_layer_cache(layer.layer_id)
        outputs: list[torch.Tensor] = []
        start = 0
        for stretch in self._stretches(forward_batch):
            tokens = slice(start, start := start + stretch.length)
            conv, state = cache.conv[0][stretch.slot], cache.temporal[stretch.slot]
            inputs, conv = _convolve(layer, mixed_qkv[tokens].T[None], conv[None])
            qkv, gates = inputs.transpose(1, 2), (a[tokens][None], b[tokens][None])
            out, state = _attend(torch_chunk_gated_delta_rule, layer, qkv, *gates, state[None])
            for slot in stretch.written:
                cache.conv[0][slot], cache.temporal[slot] = conv[0], state[0]
            outputs.append(out)
        return torch.cat(outputs, dim=1)

    def _stretches(self, forward_batch: ForwardBatch) -> Iterator[Stretch]:
        """The sequences of the batch, in two parts if the state between them is to be kept."""
        metadata, kept_at = self.forward_metadata, forward_batch.mamba_track_aligned_lens()
        kept = [0] * forward_batch.batch_size
        if kept_at is not None:
            kept = torch.where(forward_batch.mamba_track_mask, kept_at, 0).tolist()
        for request, length in enumerate(forward_batch.extend_seq_lens.tolist()):
            slot = int(metadata.mamba_cache_indices[request])
            if kept[request]:
                yield Stretch(kept[request], slot, [slot, int(metadata.mamba_track_indices[request])])
            if length > kept[request]:
                yield Stretch(length - kept[request], slot, [slot])


def _convolve(
    layer: RadixLinearAttention, inputs: torch.Tensor, before: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Convolve each channel with its weights and apply the activation; the last inputs are the next state.

    Args:
        inputs: `[sequences, channels, tokens]`.
        before: `[sequences, channels, width - 1]`.
    """
    seen = torch.cat([before.to(inputs.dtype), inputs], dim=-1)
    convolved = conv1d(seen, layer.conv_weights[:, None], layer.bias, groups=seen.shape[1])
    return silu(convolved), seen[..., -before.shape[-1] :]


def _attend(
    rule: DeltaRule,
    layer: RadixLinearAttention,
    qkv: torch.Tensor,
    a: torch.Tensor,
    b: torch.Tensor,
    state: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Output `[1, all tokens, v heads, v]`, and the state after these tokens.

    Args:
        qkv: `[sequences, tokens, all dims]`.
        a, b: `[sequences, tokens, v heads]`: inputs to decay and strength of each update.
        state: `[sequences, v heads, v, k]`.
    """
    q, k, v = qkv.split([layer.q_dim, layer.k_dim, layer.v_dim], dim=-1)
    group = layer.num_v_heads // layer.num_k_heads
    q, k = (part.unflatten(-1, (layer.num_k_heads, -1)).repeat_interleave(group, 2) for part in (q, k))
    decay = -layer.A_log.float().exp() * softplus(a.float() + layer.dt_bias.float())
    out, last = rule(
        q,
        k,
        v.unflatten(-1, (layer.num_v_heads, -1)),
        decay,
        b.sigmoid(),
        initial_state=state.mT,
        output_final_state=True,
        use_qk_l2norm_in_kernel=True,
    )
    return out.flatten(0, 1)[None], last.mT
