"""Ops on a stream, and whether they succeeded."""

from __future__ import annotations

from typing import NamedTuple

from cached_attention.transfer.streams import Event, Op


class Work:
    """Ops that belong together: after one has failed, the rest are skipped."""

    error: BaseException | None = None

    def step(self, op: Op) -> Op:
        def run() -> None:
            if self.error is None:
                try:
                    op()
                except BaseException as error:  # noqa: BLE001  Reported to whoever waits for the work.
                    self.error = error

        return run


class Step(NamedTuple):
    """An op of some work, on a stream."""

    work: Work
    ended: Event

    @property
    def has_succeeded(self) -> bool:
        """False if it failed or has not ended yet."""
        return self.ended.query() and self.work.error is None

    def wait_here(self) -> None:
        """Block the calling thread, that of saves, which exists for this; raises what the work raised."""
        self.ended.synchronize()
        if self.work.error is not None:
            raise self.work.error
