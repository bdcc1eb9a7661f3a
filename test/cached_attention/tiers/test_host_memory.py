"""Memory of the arena: where it starts, how it is pinned, and what is said when it cannot be."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from psutil import Process

from cached_attention.layout import PageLayout
from cached_attention.tiers.host import HostTier
from cached_attention.tiers.host_memory import (
    HUGE_PAGE,
    HostMemory,
    HostMemoryError,
    node_of,
    pin,
    populate,
    prefer_node,
)

CPU = torch.device("cpu")


def test_memory_starts_at_a_huge_page_and_is_free_until_it_is_used() -> None:
    memory = HostMemory(1 << 31, 4096, CPU).bytes
    assert memory.data_ptr() % HUGE_PAGE == 0
    assert memory.numel() == 1 << 31
    memory[:10], memory[-10:] = 1, 2
    assert [int(memory[i]) for i in (0, 9, 10, -11, -10, -1)] == [1, 1, 0, 0, 2, 2]


def test_memory_can_be_taken_at_once() -> None:
    memory = HostMemory(64 << 20, 4096, CPU).bytes
    before = Process().memory_info().rss
    if not populate(memory, threads=3):
        pytest.skip("this Linux has no such advice")
    assert Process().memory_info().rss - before > 0.9 * memory.numel()
    assert not memory.any()


def test_slots_are_aligned_and_of_their_own() -> None:
    host = HostTier(PageLayout(4, ((100, 100),)), 3 * 4096 + 4095)
    assert host.arena.shape == (3, 4096)
    assert host.arena.data_ptr() % HUGE_PAGE == 0
    assert host.arena.untyped_storage().data_ptr() == host.arena.data_ptr(), (
        "torch looks there for what is pinned"
    )
    host.arena[1] = 7
    assert [bytes(host.record(slot))[0] for slot in range(3)] == [0, 7, 0]


def test_every_byte_is_pinned_once_and_no_record_by_two_calls() -> None:
    memory = torch.empty(7 * 3000, dtype=torch.uint8)
    calls: list[tuple[int, int]] = []
    starts = pin(memory, 3000, lambda *call: calls.append(call), chunk=8000)
    offsets = [start - memory.data_ptr() for start in starts]
    assert offsets == [0, 6000, 12000, 18000]
    assert [size for _, size in calls] == [6000, 6000, 6000, 3000]


def test_a_record_larger_than_a_chunk_is_a_chunk() -> None:
    memory = torch.empty(2 * 3000, dtype=torch.uint8)
    assert len(pin(memory, 3000, lambda *_: None, chunk=100)) == 2


def test_where_pinning_fails_it_says_how_far_it_came_and_what_to_do() -> None:
    memory = torch.empty(4 * 3000, dtype=torch.uint8)

    def refuse(start: int, size: int) -> str | None:
        return "out of memory" if start - memory.data_ptr() >= 6000 else None

    with pytest.raises(HostMemoryError, match=r"6,000 of 12,000 bytes.*'out of memory'.*host-size"):
        pin(memory, 3000, refuse, chunk=3000)


@pytest.mark.parametrize(("said", "node"), [("1\n", 1), ("0\n", 0), ("-1\n", None), ("", None), (None, None)])
def test_the_node_of_a_gpu_is_what_the_system_says(tmp_path: Path, said: str | None, node: int | None) -> None:
    (tmp_path / "0000:3b:00.0").mkdir()
    if said is not None:
        (tmp_path / "0000:3b:00.0" / "numa_node").write_text(said)
    assert node_of("0000:3b:00.0", tmp_path) == node


@pytest.mark.parametrize("node", [0, 63])
def test_memory_can_be_used_whether_a_node_gives_it_or_not(node: int) -> None:
    memory = HostMemory(1 << 21, 4096, CPU).bytes
    assert prefer_node(memory, node) in (True, False)
    memory.fill_(3)
    assert int(memory[-1]) == 3


def test_more_than_the_system_has_is_refused_with_a_message() -> None:
    with pytest.raises(HostMemoryError, match="no room for"):
        HostMemory(1 << 60, 4096, CPU)
