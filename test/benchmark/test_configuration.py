from __future__ import annotations

from dataclasses import replace

import pytest

from benchmark.configuration import Pools, configurations, fitting_pools
from benchmark.fleet import schedule
from benchmark.workload import WorkloadShape

POOLS = Pools(small_device=1_024, large_device=8_192, host_gb=2, page_size=16)


def test_cached_attention_is_stock_plus_our_flags() -> None:
    stock, ours = configurations(["stock", "cached-attention"], POOLS, ["--dtype", "float32"])
    added = [arg for arg in ours.args if arg not in stock.args]
    assert added == ["--enable-cached-attention", "--cached-attention-host-size", "2GB"]
    assert set(stock.args) < set(ours.args)


def test_device_differs_from_stock_in_the_pool_only() -> None:
    stock, device = configurations(["stock", "device"], POOLS, [])
    assert [(a, b) for a, b in zip(stock.args, device.args, strict=True) if a != b] == [("1024", "8192")]


@pytest.mark.parametrize("names", [["stock", "nothing"], ["stock", "stock"], []])
def test_unknown_repeated_or_no_names_are_refused(names: list[str]) -> None:
    with pytest.raises(ValueError, match="choose some of"):
        configurations(names, POOLS, [])


def test_pools_hold_what_they_promise(shape: WorkloadShape) -> None:
    big = replace(shape, conversations=20)
    pools = fitting_pools(big, concurrency=2, device_fraction=0.3, host_gb=1, page_size=16)
    assert pools.large_device >= 20 * big.tokens_per_conversation
    assert 2 * big.tokens_per_conversation <= pools.small_device < 0.5 * 20 * big.tokens_per_conversation
    assert pools.small_device % 16 == pools.large_device % 16 == 0


def test_small_pool_holds_what_is_in_flight(shape: WorkloadShape) -> None:
    pools = fitting_pools(shape, concurrency=4, device_fraction=0.01, host_gb=1, page_size=16)
    assert pools.small_device >= 4 * shape.tokens_per_conversation


def test_every_round_runs_all_and_starts_with_another() -> None:
    order = list(schedule(["a", "b", "c"], 4))
    assert [name for _, name in order] == ["a", "b", "c", "b", "c", "a", "c", "a", "b", "a", "b", "c"]
    assert [index for index, _ in order] == [0] * 3 + [1] * 3 + [2] * 3 + [3] * 3
