"""Ops on a stream, and what became of them."""

from __future__ import annotations

from typing import NamedTuple

from cached_attention.transfer.streams import Event, Op


class Work:
    """Ops that belong together: after one has failed the rest is left out."""

    error: BaseException | None = None

    def step(self, op: Op) -> Op:
        def run() -> None:
            if self.error is None:
                try:
                    op()
                except BaseException as error:  # noqa: BLE001  The one who waits for the work is told.
                    self.error = error

        return run


class Step(NamedTuple):
    """One of them, on a stream."""

    work: Work
    ended: Event

    @property
    def has_succeeded(self) -> bool:
        """False also while it has not ended."""
        return self.ended.query() and self.work.error is None

    def wait_here(self) -> None:
        """On the calling thread, that of saves: it is there for that."""
        self.ended.synchronize()
        if self.work.error is not None:
            raise self.work.error
