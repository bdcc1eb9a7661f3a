"""Attention of the plain CPU as work for a stream of the simulated GPU, which CUDA graphs can record."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

import torch
from sglang.srt.mem_cache.memory_pool import KVWriteLoc
from sglang.srt.platforms.plain_cpu.attention import PlainCpuAttnBackend, _window, attend
from sglang.srt.platforms.plain_cpu.plan import ForwardPlan, LayerKind, Request

from benchmark.simulated_gpu.operators import enqueue, on_cpu

if TYPE_CHECKING:
    from sglang.srt.layers.radix_attention import RadixAttention
    from sglang.srt.model_executor.forward_batch_info import ForwardBatch


class RecordableAttnBackend(PlainCpuAttnBackend):
    """Decode steps of a CUDA graph read all they need on the device, when they run. The rest is as on a CPU."""

    _in_graph = False

    def init_cuda_graph_state(self, max_bs: int, max_num_tokens: int) -> None:
        """Nothing: what a graph reads lies in SGLang's own buffers."""

    def get_cuda_graph_seq_len_fill_value(self) -> int:
        return 1

    def init_forward_metadata(self, forward_batch: ForwardBatch) -> None:
        self._in_graph = False
        super().init_forward_metadata(forward_batch)

    def init_forward_metadata_out_graph(self, forward_batch: ForwardBatch, in_capture: bool = False) -> None:
        self._in_graph = True

    def forward_decode(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        layer: RadixAttention,
        forward_batch: ForwardBatch,
        save_kv_cache: bool = True,
    ) -> torch.Tensor:
        if not self._in_graph:
            return super().forward_decode(q, k, v, layer, forward_batch, save_kv_cache)
        pool = self.token_to_kv_pool
        if save_kv_cache:
            pool.set_kv_buffer(layer, KVWriteLoc(forward_batch.out_cache_loc, None), k, v)
        heads = layer.tp_k_head_num
        query = q.reshape(-1, heads, layer.tp_q_head_num // heads, layer.qk_head_dim)
        output = q.new_empty(*query.shape[:-1], layer.v_head_dim)
        reads = (
            self.req_to_token_pool.req_to_token,
            forward_batch.req_pool_indices,
            forward_batch.seq_lens,
            query,
            output,
            pool.get_key_buffer(layer.layer_id),
            pool.get_value_buffer(layer.layer_id),
        )
        kind = LayerKind(_window(layer), query.shape[2], False, q.dtype)
        enqueue(partial(_decode, kind, layer.scaling, *map(on_cpu, reads)))
        return output.view(len(query), -1)


def _decode(
    kind: LayerKind,
    scale: float,
    req_to_token: torch.Tensor,
    rows: torch.Tensor,
    lengths: torch.Tensor,
    query: torch.Tensor,
    output: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
) -> None:
    """Attention of one layer for one new token of each of `rows`; see `attend`."""
    requests = [Request(row, 1, length) for row, length in zip(rows.tolist(), lengths.tolist(), strict=True)]
    attend(ForwardPlan(requests, req_to_token).work(kind, None), query, output, keys, values, scale)
