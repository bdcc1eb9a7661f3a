"""What a fetch does differently for disk and remote store."""

from __future__ import annotations

from abc import ABC, abstractmethod

from cached_attention import page_runs
from cached_attention.hierarchy import Hierarchy
from cached_attention.policy.waiting import Pace
from cached_attention.stats import Reason
from cached_attention.tiers.sources import PageDisk, PageSource, SharedPages


class FetchSource(ABC):
    """A tier that pages are fetched from.

    Args:
        tier: reads pages.
        pace: learns how long its reads take, depending on their bytes.
    """

    name: str

    def __init__(self, pages: Hierarchy, tier: PageSource, pace: Pace) -> None:
        self.pages = pages
        self.tier = tier
        self.pace = pace
        self.coming = 0
        """Pages requested but not yet received."""

    def begin(self, rows: list[int]) -> None:
        """A read of these pages was requested."""
        self.coming += len(rows)

    def end(self, rows: list[int]) -> None:
        """That read has ended, or is not waited for any more."""
        self.coming -= len(rows)

    @abstractmethod
    def land(self, rows: list[int]) -> None:
        """The bytes of these pages have arrived."""

    @abstractmethod
    def give_up(self, rows: list[int], lost: list[int]) -> None:
        """These pages did not come; the tier no longer has those in `lost`, or had something else."""


class DiskSource(FetchSource):
    name = "disk"

    def __init__(self, pages: Hierarchy, tier: PageDisk, pace: Pace) -> None:
        super().__init__(pages, tier, pace)
        self._disk = tier

    def land(self, rows: list[int]) -> None:
        page_runs.land(self.pages, rows)

    def give_up(self, rows: list[int], lost: list[int]) -> None:
        if not lost:
            page_runs.give_up(self.pages, rows)
            return
        for row in rows:
            self.pages.give_up(row)
        slots = [slot for row in lost for slot in self.pages.lose(row)]
        self.pages.stats.left(self.name, Reason.DAMAGE, len(slots))
        self._disk.remove(slots)


class RemoteSource(FetchSource):
    """Pages whose checksum only their record has.

    Args:
        page_tokens: tokens per page.
    """

    name = "remote"

    def __init__(self, pages: Hierarchy, tier: SharedPages, pace: Pace, page_tokens: int) -> None:
        super().__init__(pages, tier, pace)
        self._shared = tier
        self.page_tokens = page_tokens
        self.rows: set[int] = set()
        """Being read."""

    def begin(self, rows: list[int]) -> None:
        super().begin(rows)
        self.rows.update(rows)

    def end(self, rows: list[int]) -> None:
        super().end(rows)
        self.rows.difference_update(rows)

    def land(self, rows: list[int]) -> None:
        for row in rows:
            buffer = self.pages.host.slot_bytes(self.pages.in_host.slot[row])
            self.pages.index.checksum[row] = self._shared.checksum(buffer)
            self.pages.land(row, clean=False)

    def give_up(self, rows: list[int], lost: list[int]) -> None:
        for row in rows:
            self.pages.give_up(row)
        for row in lost:
            self.pages.remote.discard(self.pages.index.key(row))
