"""Pages on their way from host memory to a tier below it."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future

from cached_attention.hierarchy import Hierarchy


class InFlight:
    """Batches of pinned rows with the tier's pending answers, oldest first. All calls come from one thread."""

    def __init__(self, pages: Hierarchy) -> None:
        self._pages = pages
        self._batches: deque[tuple[Sequence[int], Future[list[int | None]]]] = deque()

    def __len__(self) -> int:
        """Number of batches."""
        return len(self._batches)

    @property
    def rows(self) -> int:
        return sum(len(rows) for rows, _ in self._batches)

    def add(self, rows: Sequence[int], answer: Future[list[int | None]]) -> None:
        """The pinned `rows` were handed to the tier; `answer` has one item per row."""
        self._batches.append((rows, answer))

    @property
    def answers(self) -> list[Future[list[int | None]]]:
        return [answer for _, answer in self._batches]

    def abandon(self) -> None:
        """No longer wait for the tier, which may still be reading the pages."""
        while self._batches:
            for row in self._batches.popleft()[0]:
                self._pages.unpin(row)

    def settled(self) -> Iterator[tuple[int, int | None]]:
        """Rows of answered batches with their answers; each row is unpinned after being yielded."""
        while self._batches and self._batches[0][1].done():
            rows, answer = self._batches.popleft()
            for row, item in zip(rows, answer.result(), strict=True):
                yield row, item
                self._pages.unpin(row)
