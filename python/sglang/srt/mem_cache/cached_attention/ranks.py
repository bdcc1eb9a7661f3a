"""Agreement among the ranks of a model: their schedulers must decide alike, but their stores differ."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from sglang.srt.distributed.parallel_state import GroupCoordinator

TakeLeast = Callable[[torch.Tensor], object]
"""Replaces each element of a tensor by its minimum over all ranks."""
IsReady = Callable[[str, bool], bool]
"""Whether a request may run on this rank; arguments as of `CachedAttentionStore.is_ready`."""

NEAR = 8
"""Requests at the front of the queue, which the scheduler may admit without having reached them before."""


class Ranks:
    """The ranks that share the model; without `take_least` there is only one."""

    def __init__(self, is_ready: IsReady, take_least: TakeLeast | None = None) -> None:
        self._is_ready_here = is_ready
        self._take_least = take_least
        self._ready: set[str] = set()
        self._reached: set[str] = set()
        """Requests that the scheduler asked about since `agree_on_ready`."""

    def agree(self, pages: int) -> int:
        """The prefix that every rank can restore: the shortest, since shorter prefixes can be restored too."""
        if self._take_least is None:
            return pages
        agreed = torch.tensor([pages], dtype=torch.int)
        self._take_least(agreed)
        return int(agreed.item())

    def agree_on_ready(self, rids: Sequence[str]) -> None:
        """Agree on which requests of the queue may run, in one exchange for all.

        How far the scheduler will get is not known yet. Requests that it reached in its last pass, and the first
        ones, may give up waiting; the others are ready only if all their pages have arrived.
        """
        if self._take_least is None or not rids:
            return
        near = self._reached.union(rids[:NEAR])
        self._reached = set()
        agreed = torch.tensor([self._is_ready_here(rid, rid in near) for rid in rids], dtype=torch.int)
        self._take_least(agreed)
        self._ready = {rid for rid, ready in zip(rids, agreed.tolist(), strict=True) if ready}

    def is_ready(self, rid: str) -> bool:
        """Whether every rank has the pages of a queued request in host memory, or no longer waits for them."""
        if self._take_least is None:
            return self._is_ready_here(rid, True)
        self._reached.add(rid)
        return rid in self._ready


def all_agree(able: bool, ranks: GroupCoordinator) -> bool:
    """Whether all of `ranks` are able; each of them calls this, and waits for the others."""
    if ranks.world_size == 1:
        return able
    agreed = torch.tensor([able], dtype=torch.int)
    torch.distributed.all_reduce(agreed, torch.distributed.ReduceOp.MIN, group=ranks.cpu_group)
    return bool(agreed.item())
