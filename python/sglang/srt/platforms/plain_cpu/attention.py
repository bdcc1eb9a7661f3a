"""Attention on a CPU over the new queries only.

Upstream's `torch_native` backend recomputes the queries of the cached prefix and discards them, so a cache hit
saves little. Here a forward costs only its new tokens: torch's CPU flash kernel runs over the new queries with an
additive mask, the query heads that share a KV head are folded into rows (no head is repeated), and indices and
masks are built once per forward, not once per layer.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from sglang.srt.layers.attention.torch_native_backend import TorchNativeAttnBackend
from sglang.srt.layers.radix_attention import AttentionType
from sglang.srt.mem_cache.memory_pool import KVWriteLoc
from sglang.srt.platforms.plain_cpu.plan import ForwardPlan, LayerKind, LayerWork, Request, Span
from torch.nn.functional import pad, scaled_dot_product_attention

if TYPE_CHECKING:
    from sglang.srt.layers.radix_attention import RadixAttention
    from sglang.srt.model_executor.forward_batch_info import ForwardBatch
    from sglang.srt.model_executor.model_runner import ModelRunner


class PlainCpuAttnBackend(TorchNativeAttnBackend):
    """Prefix-aware attention for CPUs; cross attention and encoders use upstream's.

    Args:
        drafted: tokens written by a draft model, including the current one, beyond the sequence lengths.
    """

    def __init__(self, model_runner: ModelRunner, drafted: int = 0) -> None:
        super().__init__(model_runner)
        self._drafted = drafted
        self.plan: ForwardPlan | None = None

    def init_forward_metadata(self, forward_batch: ForwardBatch) -> None:
        super().init_forward_metadata(forward_batch)
        self.plan = None
        mode = forward_batch.forward_mode
        if mode.is_idle() or forward_batch.encoder_lens is not None:
            return
        kv_lens = (forward_batch.seq_lens + self._drafted).tolist()
        if mode.is_decode():
            q_lens = [1] * len(kv_lens)
        elif mode.is_target_verify():
            # A chain of drafts, each of which sees those before it: treated like other new tokens.
            width = forward_batch.spec_info.draft_token_num
            q_lens, kv_lens = [width] * len(kv_lens), [length + width for length in kv_lens]
        else:
            q_lens = forward_batch.extend_seq_lens.tolist()
        rows = forward_batch.req_pool_indices.tolist()
        requests = list(map(Request, rows, q_lens, kv_lens))
        self.plan = ForwardPlan(requests, self.req_to_token_pool.req_to_token)

    def get_cpu_graph_seq_len_fill_value(self) -> int:
        # With DP attention, ranks also pad batches that run without a graph.
        return 1

    def forward_extend(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        layer: RadixAttention,
        forward_batch: ForwardBatch,
        save_kv_cache: bool = True,
    ) -> torch.Tensor:
        if self.plan is None or _is_rare(layer):
            return super().forward_extend(q, k, v, layer, forward_batch, save_kv_cache)
        return self._forward(self.plan, q, k, v, layer, forward_batch, save_kv_cache)

    def forward_decode(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        layer: RadixAttention,
        forward_batch: ForwardBatch,
        save_kv_cache: bool = True,
    ) -> torch.Tensor:
        if self.plan is None or _is_rare(layer):
            return super().forward_decode(q, k, v, layer, forward_batch, save_kv_cache)
        return self._forward(self.plan, q, k, v, layer, forward_batch, save_kv_cache)

    def _forward(
        self,
        plan: ForwardPlan,
        q: torch.Tensor,
        k: torch.Tensor | None,
        v: torch.Tensor | None,
        layer: RadixAttention,
        forward_batch: ForwardBatch,
        save_kv_cache: bool,
    ) -> torch.Tensor:
        pool = self.token_to_kv_pool
        if save_kv_cache and k is not None and v is not None:
            pool.set_kv_buffer(layer, KVWriteLoc(forward_batch.out_cache_loc, self.swa_out_cache_loc), k, v)
        kv_heads = layer.tp_k_head_num
        group = layer.tp_q_head_num // kv_heads
        query = q.reshape(-1, kv_heads, group, layer.qk_head_dim)
        output = q.new_empty(len(query), kv_heads, group, layer.v_head_dim)
        translation = self._translation(layer.layer_id)
        kind = LayerKind(_window(layer), group, translation is not None, q.dtype)
        # Layer-wise loading of cached pages waits in these two calls.
        keys, values = pool.get_key_buffer(layer.layer_id), pool.get_value_buffer(layer.layer_id)
        attend(plan.work(kind, translation), query, output, keys, values, layer.scaling)
        output[plan.num_tokens :] = 0
        return output.view(len(query), -1)

    def _translation(self, layer_id: int) -> torch.Tensor | None:
        """Full slot -> slot of the sliding-window pool, for layers whose KV lives in that pool."""
        pool = self.token_to_kv_pool
        if not self.use_sliding_window_kv_pool or not pool.layers_mapping[layer_id][1]:
            return None
        return pool.full_to_swa_index_mapping


def _is_rare(layer: RadixAttention) -> bool:
    return layer.is_cross_attention or layer.attn_type == AttentionType.ENCODER_ONLY


def _window(layer: RadixAttention) -> int | None:
    window = layer.sliding_window_size
    return window if window is not None and window > -1 else None


def attend(
    work: LayerWork,
    query: torch.Tensor,
    output: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    scale: float,
) -> None:
    """Attention of one layer for the whole batch.

    Args:
        work: what the layer reads, from `ForwardPlan.work`.
        query: [tokens, kv_heads, group, qk_dim], model dtype.
        output: [tokens, kv_heads, group, v_dim], same dtype; written for the tokens of `work`.
        keys: [slots, kv_heads, qk_dim], the layer's pool, any floating dtype.
        values: [slots, kv_heads, v_dim]; may be the first columns of `keys` (MLA).
        scale: factor on the scores.

    Raises:
        ValueError: queries and stored keys differ in width.
    """
    if query.shape[-1] != keys.shape[-1]:
        raise ValueError(
            f"Queries have {query.shape[-1]} columns, the keys in the KV pool {keys.shape[-1]}: this model hands "
            "its keys to the attention backend, which on a CPU takes only those in the pool. Serve it on a GPU."
        )
    v_dim = output.shape[-1]
    for single in work.singles:
        k, v = _gather(keys, values, single.slots, query.dtype)
        out = _flash(query[single.tokens], k, v, single.mask, scale)
        output[single.tokens] = out[..., :v_dim]
    for span in work.spans:
        k, v = _gather(keys, values, span.slots[None], query.dtype)
        _attend_span(span, query[span.tokens], output[span.tokens], k, v, scale)


def _gather(
    keys: torch.Tensor, values: torch.Tensor, slots: torch.Tensor, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor]:
    """Keys and values at `slots` [n, length] as [n, kv_heads, length, dim]."""
    rows = slots.reshape(-1)
    # index_select takes a sixth of the time of indexing with a tensor, for the same copy.
    k = keys.index_select(0, rows).to(dtype)
    v = k if values.data_ptr() == keys.data_ptr() else values.index_select(0, rows).to(dtype)
    return _per_sequence(k, slots), _per_sequence(v, slots)


def _per_sequence(rows: torch.Tensor, slots: torch.Tensor) -> torch.Tensor:
    return rows.view(*slots.shape, *rows.shape[1:]).transpose(1, 2)


def _attend_span(
    span: Span, query: torch.Tensor, output: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float
) -> None:
    v_dim = output.shape[-1]
    for block in span.blocks:
        if block.mask is None:
            heads = query.flatten(1, 2).transpose(0, 1)[None]
            out = _flash(heads, k, v, None, scale, causal=True)
            output.flatten(1, 2).copy_(out[0, ..., :v_dim].transpose(0, 1))
            continue
        part = query[block.queries]
        count, kv_heads, group, qk_dim = part.shape
        folded = part.transpose(0, 1).reshape(1, kv_heads, count * group, qk_dim)
        out = _flash(folded, k[:, :, block.keys], v[:, :, block.keys], block.mask, scale)
        unfolded = out[0, ..., :v_dim].unflatten(1, (count, group)).transpose(0, 1)
        output[block.queries] = unfolded


def _flash(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    mask: torch.Tensor | None,
    scale: float,
    causal: bool = False,
) -> torch.Tensor:
    """SDPA in torch's flash kernel, which requires one width: narrower operands are padded with zeros."""
    width = max(q.shape[-1], v.shape[-1])
    q, k, v = (x if x.shape[-1] == width else pad(x, (0, width - x.shape[-1])) for x in (q, k, v))
    return scaled_dot_product_attention(
        q, k, v, attn_mask=mask, is_causal=causal, scale=scale, enable_gqa=q.shape[1] != k.shape[1]
    )
