"""What all ranks of a model say alike: their schedulers take the same decisions, their stores differ."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

TakeLeast = Callable[[torch.Tensor], object]
"""Replaces each element of a tensor by the least of all ranks'."""
IsReady = Callable[[str, bool], bool]
"""Whether a request may run on this rank, and whether it may be given up for it; see `CachedAttentionStore`."""

NEAR = 8
"""Requests at the front of the queue that the scheduler may admit before it was seen to come to them."""


class Ranks:
    """The ranks that divide the model between them; without `take_least` there is one."""

    def __init__(self, is_ready: IsReady, take_least: TakeLeast | None = None) -> None:
        self._is_ready_here = is_ready
        self._take_least = take_least
        self._ready: set[str] = set()
        self._reached: set[str] = set()
        """Requests that the scheduler asked about since `agree_on_ready`."""

    def agree(self, pages: int) -> int:
        """The prefix that every rank can restore: the shortest, since all shorter ones can be too."""
        if self._take_least is None:
            return pages
        agreed = torch.tensor([pages], dtype=torch.int)
        self._take_least(agreed)
        return int(agreed.item())

    def agree_on_ready(self, rids: Sequence[str]) -> None:
        """Agree on which requests of the queue may run, in one exchange for all.

        How far the scheduler will come is not known yet. Of those that it came to in its last pass, and of the
        first, it is decided whether they go on waiting; of the others, only whether all is there.
        """
        if self._take_least is None or not rids:
            return
        near = self._reached.union(rids[:NEAR])
        self._reached = set()
        agreed = torch.tensor([self._is_ready_here(rid, rid in near) for rid in rids], dtype=torch.int)
        self._take_least(agreed)
        self._ready = {rid for rid, ready in zip(rids, agreed.tolist(), strict=True) if ready}

    def is_ready(self, rid: str) -> bool:
        """Whether the pages of a waiting request are in host memory on every rank, or not worth waiting for."""
        if self._take_least is None:
            return self._is_ready_here(rid, True)
        self._reached.add(rid)
        return rid in self._ready
