"""Pages on their way from host memory to a tier below it."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future

from cached_attention.hierarchy import Hierarchy


class InFlight:
    """Batches of pinned rows and what the tier answers, oldest first. All calls come from one thread."""

    def __init__(self, pages: Hierarchy) -> None:
        self._pages = pages
        self._batches: deque[tuple[Sequence[int], Future[list[int | None]]]] = deque()

    def __len__(self) -> int:
        """Batches."""
        return len(self._batches)

    @property
    def rows(self) -> int:
        return sum(len(rows) for rows, _ in self._batches)

    def add(self, rows: Sequence[int], answer: Future[list[int | None]]) -> None:
        """`rows`, which are pinned, were handed to the tier; `answer` has one item for each."""
        self._batches.append((rows, answer))

    def settled(self, wait: bool = False) -> Iterator[tuple[int, int | None]]:
        """Rows whose batch has been answered, with their answers; each is unpinned after its turn.

        Args:
            wait: for the batches that have not been answered too.
        """
        while self._batches and (wait or self._batches[0][1].done()):
            rows, answer = self._batches.popleft()
            for row, item in zip(rows, answer.result(), strict=True):
                yield row, item
                self._pages.unpin(row)
