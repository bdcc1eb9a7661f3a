"""Speculative decoding on a CPU: chains of draft tokens (top-k of 1), drafted by upstream's own workers.

Upstream's kernels for trees of draft tokens need a GPU or its AMX build. For a chain a few torch functions do.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from sglang.srt.plugins.hook_registry import HookRegistry, HookType

if TYPE_CHECKING:
    from sglang.srt.model_executor.forward_batch_info import ForwardBatch

ALGORITHMS = ("EAGLE", "EAGLE3", "STANDALONE")
KERNELS = "sglang.kernels.ops.speculative"
STEPS = 3
"""Drafts in a chain, unless the user sets a number."""


def register_hooks() -> None:
    """Replace the kernels that a chain needs. Once per process."""
    factory = "sglang.srt.speculative.draft_utils.DraftBackendFactory"
    HookRegistry.register(f"{factory}.create_decode_backend", decode_backend, HookType.REPLACE)
    HookRegistry.register(f"{factory}.create_draft_extend_backend", extend_backend, HookType.REPLACE)
    # Warms up a kernel that moves the KV of accepted tokens to the front; in a chain it is there already.
    pool = "sglang.srt.mem_cache.memory_pool.MHATokenToKVPool"
    HookRegistry.register(f"{pool}._init_kv_copy_and_warmup", lambda pool: None, HookType.REPLACE)
    replaced = {
        "spec_tree.build_tree_kernel_efficient_func": build_chain,
        "spec_tree.verify_tree_greedy_func": verify_chain,
        "eagle.fill_bonus_tokens_func": fill_bonus_tokens,
        "cache_locs.assign_draft_cache_locs_contiguous_func": fill_draft_slots,
    }
    for target, function in replaced.items():
        HookRegistry.register(f"{KERNELS}.{target}", function, HookType.REPLACE)
    allocation = "sglang.srt.mem_cache.allocation.assign_req_to_token_pool_func"
    HookRegistry.register(allocation, write_slots, HookType.REPLACE)


def draft_chains(server_args: Any) -> None:
    """Draft chains where the user left it open; upstream would use trees for some models.

    Raises:
        ValueError: the user asked for trees, or for an algorithm that is not supported.
    """
    algorithm, topk = server_args.speculative_algorithm, server_args.speculative_eagle_topk
    if algorithm is None:
        return
    if algorithm.upper() not in (*ALGORITHMS, "NEXTN"):
        raise ValueError(
            f"--speculative-algorithm is {algorithm}: without a GPU give one of {', '.join(ALGORITHMS)}, or "
            "leave it out."
        )
    if topk not in (None, 1):
        raise ValueError(f"--speculative-eagle-topk is {topk}: without a GPU drafts are chains, give 1.")
    if server_args.speculative_num_steps is None:
        server_args.speculative_num_steps = STEPS
        server_args.speculative_num_draft_tokens = STEPS + 1
    server_args.speculative_eagle_topk = 1


def slots_of_chain(
    req_pool_indices: torch.Tensor,
    req_to_token: torch.Tensor,
    start_offset: torch.Tensor,
    draft_token_num: int,
    **_: Any,
) -> torch.Tensor:
    """`[requests * draft_token_num]` slots of the tokens from `start_offset` `[requests]` on."""
    columns = start_offset.long()[:, None] + torch.arange(draft_token_num)
    return req_to_token[req_pool_indices.long()[:, None], columns].reshape(-1).long()


def write_slots(
    req_pool_indices: torch.Tensor,
    req_to_token: torch.Tensor,
    start_offset: torch.Tensor,
    end_offset: torch.Tensor,
    out_cache_loc: torch.Tensor,
    batch_size: int,
) -> None:
    """Write the slots in `out_cache_loc`, request by request, into the table from start to end."""
    taken = 0
    spans = zip(req_pool_indices.tolist(), start_offset.tolist(), end_offset.tolist(), strict=True)
    for row, start, end in spans:
        req_to_token[row, start:end] = out_cache_loc[taken : taken + end - start]
        taken += end - start


def fill_draft_slots(
    req_pool_indices: torch.Tensor,
    req_to_token: torch.Tensor,
    seq_lens: torch.Tensor,
    out_cache_loc: torch.Tensor,
    topk: int,
    num_cols: int,
    positions: None = None,
    mrope: None = None,
) -> None:
    """Fill `out_cache_loc` with the slots that the draft model writes. `positions`, `mrope`: for GPUs only."""
    out_cache_loc.copy_(slots_of_chain(req_pool_indices, req_to_token, seq_lens, topk * num_cols))


def build_chain(
    parent_list: torch.Tensor,
    top_scores_index: torch.Tensor,
    seq_lens: torch.Tensor,
    tree_mask: torch.Tensor,
    positions: torch.Tensor,
    retrieve_index: torch.Tensor,
    retrieve_next_token: torch.Tensor,
    retrieve_next_sibling: torch.Tensor,
    topk: int,
    spec_steps: int,
    num_verify_tokens: int,
    tree_mask_mode: int,
) -> None:
    """Fill positions and links `[requests, num_verify_tokens]` of a tree whose nodes have one child each.

    The mask is left unchanged: the attention backend treats a chain like the new tokens of a prompt.
    """
    node = torch.arange(num_verify_tokens)
    requests = len(seq_lens)
    positions.copy_((seq_lens[:, None] + node).reshape(-1))
    retrieve_index.copy_(torch.arange(requests)[:, None] * num_verify_tokens + node)
    retrieve_next_token.copy_(torch.where(node + 1 < num_verify_tokens, node + 1, -1).expand(requests, -1))
    retrieve_next_sibling.fill_(-1)


def verify_chain(
    predicts: torch.Tensor,
    accept_index: torch.Tensor,
    accept_token_num: torch.Tensor,
    candidates: torch.Tensor,
    retrieve_index: torch.Tensor,
    retrieve_next_token: torch.Tensor,
    retrieve_next_sibling: torch.Tensor,
    target_predict: torch.Tensor,
    topk: int = -1,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Accept, in each chain, the draft tokens that the target model would have chosen, and its own next token.

    Args:
        predicts: `[requests * width]`, receives the target's choices.
        accept_index: `[requests, width]`, receives the indices of the accepted nodes, then -1.
        accept_token_num: `[requests]`, receives the number of correct drafts.
        candidates, target_predict: `[requests, width]` tokens; the target's choice after each candidate.
    """
    right = candidates[:, 1:] == target_predict[:, :-1]
    correct = right.long().cumprod(dim=1).sum(dim=1)
    node = torch.arange(candidates.shape[1])
    accept_index.copy_(torch.where(node <= correct[:, None], retrieve_index, -1)[:, : accept_index.shape[1]])
    accept_token_num.copy_(correct)
    predicts.copy_(target_predict.reshape(-1))
    return predicts, accept_index, accept_token_num


def fill_bonus_tokens(
    accept_tokens: torch.Tensor,
    accept_lens: torch.Tensor,
    bonus_tokens: torch.Tensor,
    accept_stride: int,
    batch_size: int,
) -> None:
    """Fill `bonus_tokens` `[requests]` with the last accepted token of each chain."""
    last = torch.arange(batch_size) * accept_stride + accept_lens.long() - 1
    bonus_tokens.copy_(accept_tokens.reshape(-1)[last])


class DraftSteps:
    """Attention of the draft model while it drafts several tokens, one backend per step."""

    def __init__(self, runner: Any, steps: int) -> None:
        from sglang.srt.platforms.plain_cpu.attention import PlainCpuAttnBackend

        self.attn_backends = [PlainCpuAttnBackend(runner, drafted=step + 1) for step in range(steps - 1)]

    def init_forward_metadata(self, forward_batch: ForwardBatch) -> None:
        for backend in self.attn_backends:
            backend.init_forward_metadata(forward_batch)


def decode_backend(factory: Any) -> DraftSteps | None:
    """Decode backend for upstream's `DraftBackendFactory`."""
    steps = factory.speculative_num_steps
    return DraftSteps(factory.draft_model_runner, steps) if steps > 1 else None


def extend_backend(factory: Any) -> Any:
    """Attention of the draft model while it reads the tokens that the target model has accepted."""
    from sglang.srt.platforms.plain_cpu.attention import PlainCpuAttnBackend

    return PlainCpuAttnBackend(factory.draft_model_runner)
