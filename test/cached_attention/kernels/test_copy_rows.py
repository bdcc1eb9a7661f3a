"""The GPU's copies, run on the host: the kernel word by word, and what is handed to the copy engines."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cached_attention.kernels.compilation import load_library
from cached_attention.kernels.copy_rows import NO_STREAM, RowCopies

ROWS = 6
Copy = Callable[[RowCopies, torch.Tensor, torch.Tensor], None]


@pytest.fixture(scope="module")
def library() -> Any:
    library = load_library("90a")
    assert library is not None
    return library


def by_cores(copies: RowCopies, targets: torch.Tensor, sources: torch.Tensor) -> None:
    copies.by_cores(slice(None), targets, sources, 4)


def by_many_cores(copies: RowCopies, targets: torch.Tensor, sources: torch.Tensor) -> None:
    """With blocks for as many arrays as fit into a launch."""
    copies.by_cores(slice(None), targets, sources, 64)


def by_engines(copies: RowCopies, targets: torch.Tensor, sources: torch.Tensor) -> None:
    copies.by_engines(slice(None), targets, sources, NO_STREAM)


def some_by_cores(copies: RowCopies) -> None:
    copies.by_cores(slice(1, 3), numbers(0), numbers(5), 4)


def some_by_engines(copies: RowCopies) -> None:
    copies.by_engines(slice(1, 3), numbers(0), numbers(5), NO_STREAM)


def rows(size: int, gap: int = 0, start: int = 0) -> torch.Tensor:
    """`[ROWS, size]`, uint8, random, `gap` bytes between rows, `start` bytes off a multiple of 16."""
    memory = torch.randint(0, 256, (ROWS * (size + gap) + 16,), dtype=torch.uint8)
    return memory[start : start + ROWS * (size + gap)].view(ROWS, size + gap)[:, :size]


def numbers(*values: int) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int32)


@pytest.mark.parametrize("copy", [by_cores, by_many_cores, by_engines])
@settings(deadline=None, max_examples=80)
@given(data=st.data())
def test_rows_go_where_they_shall_and_nothing_else_changes(library: Any, copy: Copy, data: st.DataObject) -> None:
    """More arrays than one launch takes, aligned and not, of unequal sizes."""
    pick = data.draw
    sizes = pick(st.lists(st.sampled_from([16, 48, 4096, 1, 17, 100]), min_size=1, max_size=40))
    gaps = pick(st.sampled_from([(0, 0), (16, 32), (3, 0)]))
    start = pick(st.sampled_from([0, 1]))
    pairs = [(rows(size, gaps[0], start), rows(size, gaps[1])) for size in sizes]
    targets = pick(st.permutations(range(ROWS)))[: pick(st.integers(0, ROWS))]
    sources = [pick(st.integers(0, ROWS - 1)) for _ in targets]
    expected = [target.clone() for target, _ in pairs]
    for (_, source), want in zip(pairs, expected, strict=True):
        want[targets] = source[sources]
    copy(RowCopies(pairs, library), numbers(*targets), numbers(*sources))
    assert all(torch.equal(target, want) for (target, _), want in zip(pairs, expected, strict=True))


@pytest.mark.parametrize("copy", [some_by_cores, some_by_engines])
def test_only_the_pairs_asked_for(library: Any, copy: Callable[[RowCopies], None]) -> None:
    pairs = [(rows(32).zero_(), rows(32)) for _ in range(4)]
    copy(RowCopies(pairs, library))
    assert [bool(target.any()) for target, _ in pairs] == [False, True, True, False]


def test_sides_that_do_not_match_are_refused(library: Any) -> None:
    with pytest.raises(ValueError, match="32 bytes does not fit one of 16"):
        RowCopies([(rows(16), rows(32))], library)
    with pytest.raises(ValueError, match="uint8"):
        RowCopies([(rows(16), rows(64).view(torch.float32))], library)
    with pytest.raises(RuntimeError, match="rows"):
        RowCopies([(rows(16), rows(16))], library).by_cores(slice(None), numbers(0, 1), numbers(0), 4)
