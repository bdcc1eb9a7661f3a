"""Workloads for the servers, by the shape of the model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from benchmark.configuration import Pools, fitting_pools
from benchmark.gpu.bound import Bound
from benchmark.gpu.traffic import Mixture
from benchmark.workload import WorkloadShape

PAGE = 64
SMALL_DEVICE = 0.3
"""Share of the tokens of a round of conversations that the small device pool holds."""


@dataclass(frozen=True)
class Load:
    """Lengths in tokens, host memory in gigabytes.

    `first_token` is the bound on a hit in host memory, at `history` tokens and the worst of `news`: relative to a
    device hit, or, if it is about what is saved, to recomputing.
    """

    context: int
    history: int
    news: tuple[int, ...]
    first_token: Bound
    multiturn: WorkloadShape
    zero_hit: WorkloadShape
    mixture: Mixture
    host_gb: int
    concurrency: int
    rounds: int

    def pools(self) -> Pools:
        """A device pool too small for the conversations, but large enough for everything that runs at once."""
        pools = fitting_pools(self.multiturn, self.concurrency, SMALL_DEVICE, self.host_gb, PAGE)
        return replace(pools, small_device=max(pools.small_device, *self._at_once()))

    def _at_once(self) -> tuple[int, int, int]:
        alone = 2 * (self.history + max(self.news))
        answers, arrivals = self.mixture.answers, self.mixture.arrivals
        mixed = answers.conversations * answers.tokens_per_conversation + 2 * arrivals.tokens_per_conversation
        many = self.concurrency * self.zero_hit.tokens_per_conversation
        slack = (answers.conversations + self.concurrency + 4) * PAGE
        return _whole(alone + slack), _whole(mixed + slack), _whole(many + slack)


def hit(history: int, news: Sequence[int]) -> Bound:
    return Bound(f"server: TTFT of a host hit to a device hit, {history} + {min(news)} or more", 1.10)


def saving(history: int, new: int) -> Bound:
    return Bound(f"server: TTFT saved against recompute, {history} + {new}", 0.87, at_least=True, unit="")


def _whole(tokens: int) -> int:
    return -(-tokens // PAGE) * PAGE


NEWS = (100, 500, 1_000, 2_000)
ANSWERS = WorkloadShape(conversations=8, turns=1, history=400, new=100, output=256)
ARRIVALS = WorkloadShape(conversations=16, turns=1, history=1_900, new=100, output=1, arrival_rate=5.0)
LOADS = {
    "llama-3-8b": Load(
        context=16_384,
        history=8_192,
        news=NEWS,
        first_token=hit(8_192, NEWS),
        multiturn=WorkloadShape(16, 4, history=4_000, new=100, output=64, think_time_s=0.5),
        zero_hit=WorkloadShape(32, 1, history=1_900, new=100, output=64),
        mixture=Mixture(ANSWERS, ARRIVALS),
        host_gb=24,
        concurrency=8,
        rounds=2,
    ),
    "llama-2-13b": Load(
        context=8_192,
        history=4_096,
        news=(100,),
        first_token=saving(4_096, 100),
        multiturn=WorkloadShape(8, 4, history=2_500, new=100, output=64, think_time_s=0.5),
        zero_hit=WorkloadShape(24, 1, history=1_900, new=100, output=64),
        mixture=Mixture(ANSWERS, replace(ARRIVALS, conversations=12, arrival_rate=3.0)),
        host_gb=32,
        concurrency=4,
        rounds=2,
    ),
    "tiny": Load(
        context=2_048,
        history=256,
        news=(16,),
        first_token=hit(256, (16,)),
        multiturn=WorkloadShape(4, 3, history=256, new=16, output=4),
        zero_hit=WorkloadShape(4, 1, history=112, new=16, output=4),
        mixture=Mixture(
            WorkloadShape(2, 1, history=48, new=16, output=24),
            WorkloadShape(3, 1, history=112, new=16, output=1, arrival_rate=5.0),
        ),
        host_gb=1,
        concurrency=2,
        rounds=1,
    ),
}
