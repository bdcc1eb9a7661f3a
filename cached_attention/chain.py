"""The page keys of one prompt, and how far the store can restore them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from cached_attention.index import PageKey

if TYPE_CHECKING:
    import torch


@dataclass(slots=True)
class Reached:
    """What `Reach` remembers of a chain since the last lookups."""

    restorable: int = 0
    """Leading pages in some tier."""
    loadable: int = 0
    """Leading pages in host memory."""
    epoch: int = -1
    disorder: int = -1
    """`epoch` and `disorder` of the hierarchy."""


@dataclass
class Chain:
    """Page keys in order. A request keeps its chain, so that a key is computed and looked up once."""

    keys: list[PageKey] = field(default_factory=list)
    reached: Reached = field(default_factory=Reached, init=False, repr=False, compare=False)
    """Kept by `Reach`."""


@dataclass(frozen=True)
class PageRun:
    """Consecutive pages of a chain that are on the device."""

    parent: PageKey | None
    """Key of the page before the run; None at the start of a prompt."""
    first_page: int
    """Number of pages before the run."""
    keys: list[PageKey]
    device_slots: torch.Tensor
    """`[len(keys) * page_size]`, integer: the token slots, in order."""


def reach(keys: Sequence[PageKey], known: int, present: Callable[[PageKey], bool]) -> int:
    """Number of leading keys that are present; at the last call it was `known`.

    Pages leave from the tail, so it is enough to check the end of the known part.
    """
    end = min(known, len(keys))
    while end and not present(keys[end - 1]):
        end -= 1
    while end < len(keys) and present(keys[end]):
        end += 1
    return end
