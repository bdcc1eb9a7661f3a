"""Chains of draft tokens on a CPU, against their definition."""

import random
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from sglang.srt.platforms.plain_cpu import speculation
from sglang.srt.platforms.plain_cpu.platform import PlainCpuPlatform

TABLE = torch.arange(5 * 40).view(5, 40).int() * 3


def links(seq_lens: list[int], width: int) -> tuple[torch.Tensor, ...]:
    """Positions, node numbers, next nodes and siblings of chains after so many tokens."""
    requests = len(seq_lens)
    positions = torch.empty(requests * width, dtype=torch.long)
    index, following, sibling = (torch.full((requests, width), -1) for _ in range(3))
    mask = torch.ones(1, dtype=torch.bool)
    speculation.build_chain(
        torch.empty(0),
        torch.empty(0),
        torch.tensor(seq_lens),
        mask,
        positions,
        index,
        following,
        sibling,
        1,
        width - 1,
        width,
        1,
    )
    return positions, index, following, sibling


def test_each_node_of_a_chain_has_one_child() -> None:
    positions, index, following, sibling = links([7, 20], 3)
    assert positions.tolist() == [7, 8, 9, 20, 21, 22]
    assert index.tolist() == [[0, 1, 2], [3, 4, 5]]
    assert following.tolist() == [[1, 2, -1]] * 2
    assert sibling.eq(-1).all()


@given(st.integers(1, 4), st.integers(1, 5), st.integers(0, 1_000_000))
def test_drafts_are_accepted_up_to_the_first_that_is_wrong(requests: int, drafts: int, seed: int) -> None:
    draw, width = random.Random(seed), drafts + 1
    candidates = torch.tensor([[draw.randrange(3) for _ in range(width)] for _ in range(requests)])
    chosen = torch.tensor([[draw.randrange(3) for _ in range(width)] for _ in range(requests)])
    _, index, following, sibling = links([9] * requests, width)
    accepted = torch.full((requests, width), -1, dtype=torch.int32)
    correct = torch.empty(requests, dtype=torch.int32)
    predicted, accepted, correct = speculation.verify_chain(
        torch.zeros(requests * width, dtype=torch.int32),
        accepted,
        correct,
        candidates,
        index,
        following,
        sibling,
        chosen,
    )
    for row in range(requests):
        right = 0
        while right < drafts and candidates[row, right + 1] == chosen[row, right]:
            right += 1
        nodes = [row * width + node for node in range(right + 1)]
        assert accepted[row].tolist() == nodes + [-1] * (width - len(nodes))
        assert correct[row] == right
        assert predicted[nodes].tolist() == chosen[row, : right + 1].tolist()
    bonus = torch.empty(requests, dtype=torch.int32)
    speculation.fill_bonus_tokens(predicted[accepted.long()], correct + 1, bonus, width, requests)
    assert bonus.tolist() == chosen[torch.arange(requests), correct.long()].tolist()


def test_slots_come_from_the_table_and_go_back_into_it() -> None:
    rows, starts = torch.tensor([3, 1]), torch.tensor([5, 30])
    expected = torch.cat([TABLE[3, 5:9], TABLE[1, 30:34]])
    assert speculation.slots_of_chain(rows, TABLE, starts, 4).tolist() == expected.tolist()
    slots = torch.zeros(8, dtype=torch.long)
    speculation.fill_draft_slots(rows, TABLE, starts, slots, 1, 4)
    assert slots.tolist() == expected.tolist()
    table = torch.zeros_like(TABLE)
    speculation.write_slots(rows, table, starts, starts + torch.tensor([4, 2]), torch.arange(1, 7), 2)
    assert table[3, 5:9].tolist() == [1, 2, 3, 4]
    assert table[1, 30:32].tolist() == [5, 6]
    assert table.count_nonzero() == 6


@pytest.mark.parametrize(("algorithm", "is_there"), [("EAGLE", True), ("STANDALONE", True), ("DFLASH", False)])
def test_the_platform_says_what_it_can_do(algorithm: str, is_there: bool) -> None:
    platform = PlainCpuPlatform()
    assert platform.supports_speculative_algorithm(algorithm) == is_there
    assert platform.get_speculative_cache_locs_fn() is speculation.slots_of_chain


def arguments(**given: Any) -> Any:
    names = ("algorithm", "eagle_topk", "num_steps", "num_draft_tokens")
    return SimpleNamespace(**{f"speculative_{name}": given.get(name) for name in names})


def test_drafts_are_chains_unless_the_user_says_how_long() -> None:
    said = {"eagle_topk": 1, "num_steps": 5, "num_draft_tokens": 6}
    for chain, expected in (({}, (1, 3, 4)), (said, (1, 5, 6))):
        args = arguments(algorithm="EAGLE", **chain)
        speculation.draft_chains(args)
        found = (args.speculative_eagle_topk, args.speculative_num_steps, args.speculative_num_draft_tokens)
        assert found == expected
    args = arguments()
    speculation.draft_chains(args)
    assert args.speculative_num_steps is None


def test_what_needs_a_gpu_is_refused() -> None:
    with pytest.raises(ValueError, match="eagle-topk is 4: without a GPU drafts are chains, give 1"):
        speculation.draft_chains(arguments(algorithm="EAGLE", eagle_topk=4))
    with pytest.raises(ValueError, match="algorithm is NGRAM: without a GPU give one of EAGLE, EAGLE3, "):
        speculation.draft_chains(arguments(algorithm="NGRAM"))
