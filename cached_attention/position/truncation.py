"""Which tokens stay of a prompt that outgrew the context window (CachedAttention, Gao et al. 2024, section 3.4).

The start of the prompt stays: it is the attention sink (StreamingLLM, Xiao et al. 2024, section 3.1) and holds
the system prompt. The oldest tokens after it are dropped, the rest stays. What is dropped depends on the prompt's
length alone and grows in steps, so that it stays the same for many turns, and with it the kept tokens and their
keys and values.

All lengths are whole pages: a page holds the same tokens under every plan, and only its position changes. So the
seam, where the tokens after the dropped ones follow the sink, is at a page boundary, not between two messages. A
special token is a single token and is never split, but a message, or the few tokens of its header, may be: the
model then reads the sink, the tail of some message, and all messages after it. A seam moved to the next message
would be off the page grid, and every page after it would have to be recomputed.
"""

from __future__ import annotations

from array import array
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import overload

from cached_attention.index import PageKey


@dataclass(frozen=True)
class TruncationPlan:
    """The tokens to drop: `dropped` of them, after the first `sink`; no token if `dropped` is 0."""

    sink: int
    dropped: int
    step: int

    def keep(self, tokens: array[int]) -> array[int]:
        """The tokens of the prompt that are kept."""
        return tokens[: self.sink] + tokens[self.sink + self.dropped :] if self.dropped else tokens

    def earlier(self) -> Iterator[TruncationPlan]:
        """The plans of the same conversation when it was shorter, nearest first; the last one drops nothing."""
        for dropped in range(self.dropped - self.step, -1, -self.step):
            yield TruncationPlan(self.sink, dropped, self.step)


@dataclass(frozen=True)
class TruncationRule:
    """How prompts are truncated; lengths are in tokens unless they say pages.

    Tokens are dropped in steps of `ratio` of the window, in whole pages: at least one page, and at most as much
    as leaves a page of the most recent tokens in any prompt. That page takes precedence over sink pages: if the
    step leaves room for fewer of those, there are fewer, for prompts of every length.

    Args:
        window: positions that the model and the KV pool have for a prompt and its answer.
        limit: a prompt must be shorter than this.
        ratio: above 0, below 1.

    Raises:
        ValueError: the window is too small to drop a page and keep one.
    """

    window: int
    limit: int
    page_size: int
    ratio: float
    sink_pages: int

    def __post_init__(self) -> None:
        if self.limit < 2 * self.page_size:
            raise ValueError(
                f"A window that takes {self.limit - 1} tokens has no room for two pages of {self.page_size}: "
                f"give a smaller --page-size, or more room for the KV cache."
            )

    @property
    def step(self) -> int:
        pages = int(round(self.ratio * self.window, 6)) // self.page_size
        most = self.limit // self.page_size - 1
        return max(1, min(pages, most)) * self.page_size

    @property
    def sink(self) -> int:
        """Tokens kept at the start."""
        most = (self.limit - self.step) // self.page_size - 1
        return min(self.sink_pages, most) * self.page_size

    def plan(self, length: int) -> TruncationPlan:
        """What to drop from a prompt of `length` tokens: the fewest steps that make it fit."""
        excess = max(0, length - self.limit + 1)
        return TruncationPlan(self.sink, -(-excess // self.step) * self.step, self.step)

    def sources(
        self, plan: TruncationPlan, pages: int, keys_under: Callable[[TruncationPlan], Callable[[int], PageKey]]
    ) -> Iterator[EarlierPages]:
        """Where the first `pages` pages that `plan` keeps may have been computed before, nearest first.

        Includes the earlier plans that share more than the sink with this one, and the whole prompt.

        Args:
            keys_under: returns, for an earlier plan, the function from a page that it keeps to the page's key.
        """
        for earlier in plan.earlier():
            moved = plan.dropped - earlier.dropped
            if not earlier.dropped or plan.sink + moved < self.window:
                yield EarlierPages(self, pages, moved, keys_under(earlier))


class EarlierPages(Sequence[PageKey | None]):
    """Keys that pages had when they were `moved` tokens later in the prompt, computed on demand.

    None: at that place the page would lie beyond the window.
    """

    def __init__(self, rule: TruncationRule, pages: int, moved: int, key: Callable[[int], PageKey]) -> None:
        self._pages = pages
        self._key = key
        self._sink_pages = rule.sink // rule.page_size
        self._moved_pages = moved // rule.page_size
        self._window_pages = rule.window // rule.page_size

    def __len__(self) -> int:
        return self._pages

    @overload
    def __getitem__(self, page: int) -> PageKey | None: ...
    @overload
    def __getitem__(self, page: slice) -> list[PageKey | None]: ...
    def __getitem__(self, page: int | slice) -> PageKey | list[PageKey | None] | None:
        if isinstance(page, slice):
            return [self[i] for i in range(*page.indices(self._pages))]
        if not 0 <= page < self._pages:
            raise IndexError(f"page {page} of {self._pages}")
        before = page if page < self._sink_pages else page + self._moved_pages
        return self._key(before) if before < self._window_pages else None
