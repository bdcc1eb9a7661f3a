"""Configurations to compare: names and the server arguments they stand for."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from benchmark.workload import WorkloadShape

# Room for the partly filled page of each request and for the server's own use.
DEVICE_SLACK = 1.1


@dataclass(frozen=True)
class Pools:
    """Sizes of the tiers: device pools in tokens, host tier in gigabytes, page in tokens."""

    small_device: int
    large_device: int
    host_gb: int
    page_size: int


@dataclass(frozen=True)
class Configuration:
    """A name, and what it adds to the server's command line."""

    name: str
    args: tuple[str, ...]


def _stock(pools: Pools) -> tuple[str, ...]:
    return ("--max-total-tokens", str(pools.small_device))


def _cached_attention(pools: Pools) -> tuple[str, ...]:
    host = ("--cached-attention-host-size", f"{pools.host_gb}GB")
    return (*_stock(pools), "--enable-cached-attention", *host)


def _hicache(pools: Pools) -> tuple[str, ...]:
    host = ("--hicache-size", str(pools.host_gb))
    return (*_stock(pools), "--enable-hierarchical-cache", *host)


def _device(pools: Pools) -> tuple[str, ...]:
    return ("--max-total-tokens", str(pools.large_device))


CONFIGURATIONS: dict[str, Callable[[Pools], tuple[str, ...]]] = {
    "stock": _stock,
    "cached-attention": _cached_attention,
    "device": _device,
    "hicache": _hicache,
}


def configurations(names: Sequence[str], pools: Pools, server_args: Sequence[str]) -> list[Configuration]:
    """Configurations called `names`, all with `server_args`; ValueError for an unknown or repeated name."""
    unknown = [name for name in names if name not in CONFIGURATIONS]
    if unknown or len(set(names)) != len(names) or not names:
        raise ValueError(f"configurations {list(names)}: choose some of {list(CONFIGURATIONS)}, each once")
    # Without --sleep-on-idle, servers waiting for their round would each spin on a core.
    shared = ("--page-size", str(pools.page_size), "--sleep-on-idle", *server_args)
    return [Configuration(name, (*CONFIGURATIONS[name](pools), *shared)) for name in names]


def fitting_pools(
    shape: WorkloadShape, concurrency: int, device_fraction: float, host_gb: int, page_size: int
) -> Pools:
    """Device pools for a workload: the large one holds all conversations of a round, the small one
    `device_fraction` of them, but at least those in flight."""
    one = _pages(shape.tokens_per_conversation * DEVICE_SLACK, page_size) + page_size
    large = one * shape.conversations
    in_flight = one * min(concurrency, shape.conversations)
    small = max(_pages(large * device_fraction, page_size), in_flight)
    return Pools(small_device=small, large_device=large, host_gb=host_gb, page_size=page_size)


def _pages(tokens: float, page_size: int) -> int:
    return math.ceil(tokens / page_size) * page_size
