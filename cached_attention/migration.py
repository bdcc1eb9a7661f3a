"""All that moves between host memory and one disk tier."""

from __future__ import annotations

from collections.abc import Callable

from cached_attention.fetch import Fetch
from cached_attention.hierarchy import Hierarchy
from cached_attention.look_ahead import LookAhead
from cached_attention.policy.waiting import WaitOrRecompute
from cached_attention.stats import Reason
from cached_attention.tiers.disk import DiskTier
from cached_attention.write_behind import WriteBehind


class Migration:
    """Fetch, its look-ahead and write-behind over one disk tier. All calls come from one thread.

    Args:
        look_ahead: waiting requests whose pages are fetched before they run.
        min_uses: a page is written once it was used this often.
        page_tokens: tokens per page.
    """

    def __init__(
        self,
        pages: Hierarchy,
        disk: DiskTier,
        decision: WaitOrRecompute,
        *,
        look_ahead: int,
        min_uses: int,
        page_tokens: int,
        clock: Callable[[], float],
    ) -> None:
        self._pages = pages
        self._disk = disk
        self.fetch = Fetch(pages, disk, decision.fetching)
        self.ahead = LookAhead(pages, self.fetch, decision, look_ahead, page_tokens)
        self.write_behind = WriteBehind(pages, disk, min_uses, clock)

    @property
    def pins(self) -> int:
        """Pins held for requests, reads and writes."""
        return self.fetch.pins + self.write_behind.rows_in_flight

    def counters(self) -> dict[str, int]:
        """Counts and fill levels, in pages."""
        return {
            "disk_pages": self._disk.capacity_slots,
            "disk_pages_used": self._pages.on_disk.pages,
            "dirty": self._pages.dirty.pages,
            "fetched": self._pages.stats.fetched,
            "lost": self._pages.stats.lost,
            "recomputed": self._pages.stats.recomputed,
            "look_ahead": self.ahead.depth,
            "disk_errors": self._disk.io_errors,
            "disk_damaged": self._disk.checksum_failures,
            "disk_healthy": int(self._disk.healthy),
        }

    def poll(self) -> None:
        """Take note of what has ended, and start more; never waits."""
        self.fetch.poll()
        self.ahead.advance()
        self.write_behind.poll(self.fetch.is_reading, self.fetch.held)

    def expire(self, count: int, limit: float) -> int:
        """Remove from the disk up to `count` pages that were last used before `limit`; returns how many."""
        slots = self.write_behind.evict(count, limit)
        self._pages.stats.left("disk", Reason.TTL, len(slots))
        self._disk.remove(slots)
        return len(slots)

    def clear(self) -> None:
        """Remove every page from the disk. Walks all pages."""
        self._pages.stats.left("disk", Reason.FLUSH, self._pages.on_disk.pages)
        self._disk.remove([slot for row in self._pages.rows_on_disk() for slot in self._pages.leave_disk(row)])

    def wait(self) -> None:
        """Until the disk touches no page of the arena; nothing is held for requests any more."""
        self.fetch.wait()
        self.write_behind.wait()
