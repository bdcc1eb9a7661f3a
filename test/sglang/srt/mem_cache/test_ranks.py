"""Ranks say the same of a prompt and of the waiting queue."""

from __future__ import annotations

import torch
from sglang.srt.mem_cache.cached_attention.ranks import NEAR, Ranks

QUEUE = [f"request {place}" for place in range(3 * NEAR)]


def is_given_up(rid: str, may_give_up: bool) -> bool:
    """Of a store in which nothing ever arrives, and nothing is worth waiting for."""
    return may_give_up


def alike(numbers: torch.Tensor) -> None:
    """The other rank's are the same."""


def test_whoever_the_scheduler_came_to_is_given_up_in_the_next_pass_and_the_first_at_once() -> None:
    ranks = Ranks(is_given_up, alike)
    first, reached, behind = QUEUE[0], QUEUE[NEAR], QUEUE[-1]
    ranks.agree_on_ready(QUEUE)
    assert ranks.is_ready(first)
    assert not ranks.is_ready(reached)
    ranks.agree_on_ready(QUEUE)
    assert ranks.is_ready(reached)
    assert not ranks.is_ready(behind)


def test_a_request_runs_when_it_may_on_every_rank() -> None:
    def other(numbers: torch.Tensor) -> None:
        numbers[1] = 0

    ranks = Ranks(lambda rid, may_give_up: True, other)
    ranks.agree_on_ready(QUEUE)
    assert [rid for rid in QUEUE if not ranks.is_ready(rid)] == [QUEUE[1]]


def test_the_shortest_prefix_counts() -> None:
    def other(numbers: torch.Tensor) -> None:
        numbers.clamp_(max=3)

    ranks = Ranks(is_given_up, other)
    assert [ranks.agree(pages) for pages in (2, 3, 7)] == [2, 3, 3]


def test_one_rank_asks_nobody() -> None:
    ranks = Ranks(is_given_up)
    ranks.agree_on_ready(QUEUE)
    assert ranks.agree(7) == 7
    assert all(map(ranks.is_ready, QUEUE))
