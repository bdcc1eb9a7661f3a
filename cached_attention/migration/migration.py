"""All transfers between host memory and the tiers below it."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, wait
from typing import Any

from cached_attention import admission
from cached_attention.chain import reach
from cached_attention.hierarchy import Hierarchy
from cached_attention.index import PageKey
from cached_attention.migration.disk_write_behind import DiskWriteBehind
from cached_attention.migration.fetch import Fetch
from cached_attention.migration.fetch_source import DiskSource, RemoteSource
from cached_attention.migration.look_ahead import LookAhead
from cached_attention.migration.lookups import Lookups
from cached_attention.migration.remote_write_behind import RemoteWriteBehind
from cached_attention.migration.write_behind import WriteBehind
from cached_attention.policy.waiting import WaitOrRecompute
from cached_attention.stats import Reason
from cached_attention.tiers.disk import DiskTier
from cached_attention.tiers.host import HostTier
from cached_attention.tiers.remote import RemoteTier

logger = logging.getLogger(__name__)

TOLD_AT_ONCE = 256
"""Pages per poll that are reported to have left the remote tier after an outage."""


class Migration:
    """Prefetching from all lower tiers, and write-behind to each. All calls come from one thread.

    Args:
        look_ahead: number of queued requests whose pages are fetched before they run.
        min_uses: write a page to disk after this many uses.
        page_tokens: tokens per page.
        lookups: how pages are looked up in `remote`.
        on_found: called with a queued request and its chain when a lookup found pages of it.
    """

    def __init__(
        self,
        pages: Hierarchy,
        disk: DiskTier | None,
        remote: RemoteTier | None,
        decision: WaitOrRecompute,
        *,
        look_ahead: int,
        min_uses: int,
        page_tokens: int,
        lookups: type[Lookups],
        on_found: Callable[[str, Sequence[PageKey]], object],
    ) -> None:
        self._pages = pages
        self._disk = disk
        self._remote = remote
        self.fetch = Fetch(
            pages,
            None if disk is None else DiskSource(pages, disk, decision.fetching),
            None if remote is None else RemoteSource(pages, remote, decision.remote, page_tokens),
        )
        self.ahead = LookAhead(pages, self.fetch, decision, look_ahead, page_tokens)
        self.to_disk = None if disk is None else DiskWriteBehind(pages, disk, min_uses)
        self.to_remote = None if remote is None else RemoteWriteBehind(pages, remote)
        writers: list[WriteBehind | None] = [self.to_disk, self.to_remote]
        self._writers = [writer for writer in writers if writer is not None]
        self.lookups = None if remote is None else lookups(pages, remote, decision, page_tokens)
        self._on_found = on_found
        self._outages = -1

    @property
    def pins(self) -> int:
        """Number of pins held for requests, reads and writes."""
        return self.fetch.pins + sum(writer.rows_in_flight for writer in self._writers)

    def counters(self) -> dict[str, int]:
        """Counts and fill levels, in pages."""
        stats, counts = self._pages.stats, dict[str, int]()
        if self._writers:
            counts |= {"fetched": stats.fetched, "lost": stats.lost, "recomputed": stats.recomputed}
            counts["look_ahead"] = self.ahead.depth
        if self._disk is not None and self.to_disk is not None:
            counts |= {
                "disk_pages": self._disk.capacity_slots,
                "disk_pages_used": self._pages.on_disk.pages,
                "dirty": self._pages.dirty.pages,
                "writing": self.to_disk.rows_in_flight,
                "disk_errors": self._disk.io_errors,
                "disk_damaged": self._disk.checksum_failures,
                "disk_healthy": int(self._disk.healthy),
            }
        if self._remote is not None:
            counts |= {f"remote_{name}": count for name, count in vars(self._remote.stats).items()}
            counts |= {
                "remote_lookups": stats.lookups,
                "remote_known": len(self._pages.remote),
                "remote_unshared": self._pages.remote.unshared,
                "remote_errors": self._remote.errors,
                "remote_healthy": int(self._remote.healthy),
            }
        return counts

    def arrive(
        self,
        request: str,
        keys: Sequence[PageKey],
        loadable: int,
        restorable: int,
        page_tokens: int,
        on_device: int,
    ) -> None:
        """`request` with the chain `keys` is queued.

        Args:
            loadable, restorable: number of its leading pages in host memory, and in any tier.
            page_tokens: tokens to recompute per page that is not waited for.
            on_device: leading pages that are on the device. If all restorable pages are, nothing is fetched.
        """
        if restorable > max(loadable, on_device):
            self.ahead.prefetch(request, keys[:restorable], loadable, page_tokens)
        if self.lookups is not None:
            self.lookups.look_up(request, keys, restorable, on_device)

    def leave(self, request: str) -> None:
        """`request` runs or was aborted."""
        self.ahead.leave(request)
        if self.lookups is not None:
            self.lookups.leave(request)

    def gave_up(self, request: str) -> bool:
        """Whether `request` may run because waiting for its pages is not expected to pay off."""
        return self.ahead.gave_up(request)

    def is_ready(self, request: str, may_give_up: bool = True) -> bool:
        """Whether `request` may run, see `LookAhead.is_ready` and `Lookups.is_ready`."""
        is_known = self.lookups is None or self.lookups.is_ready(request, may_give_up)
        return is_known and self.ahead.is_ready(request, may_give_up)

    def poll(self) -> None:
        """Process transfers that have ended, and start more; never waits."""
        self.fetch.poll()
        self._poll_lookups()
        self.ahead.advance()
        if self.to_disk is not None:
            self.to_disk.poll(self.fetch.is_reading, self.fetch.held)
        if self.to_remote is not None:
            self.to_remote.poll()

    def _poll_lookups(self) -> None:
        if self._remote is None or self.lookups is None:
            return
        if self._outages != self._remote.outages:
            self._outages = self._remote.outages
            self._pages.remote.clear()
            self._pages.epoch += 1
        self._pages.remote.tell(TOLD_AT_ONCE)
        for request, keys in self.lookups.poll():
            self._on_found(request, keys)

    def prefetch_found(self, request: str, keys: Sequence[PageKey]) -> None:
        """Fetch all restorable pages of the chain `keys` for the queued `request`."""
        loadable, restorable = self._pages.loadable(keys, 0), self._pages.restorable(keys, 0)
        self.ahead.prefetch(request, keys[:restorable], loadable)

    def drop(self, keys: Sequence[PageKey]) -> int:
        """Remove a chain from every tier, except for pages in use; returns the pages removed from this server."""
        self.fetch.poll()  # What was on its way for a hint is not needed any more.
        dropped, slots = self._pages.drop(keys)
        if self._disk is not None:
            self._disk.remove(slots)
        self.forget(keys)
        return dropped

    def forget(self, keys: Sequence[PageKey]) -> None:
        """Remove a chain from the remote store, except for the leading pages that this server still keeps."""
        if self._remote is not None:
            dropped = keys[reach(keys, 0, self._pages.is_kept) :]
            for key in dropped:
                self._pages.remote.discard(key)
            self._remote.remove(dropped)

    def expire(self, count: int, limit: float) -> None:
        """Remove up to `count` pages last used before `limit` from the disk."""
        if self._disk is not None:
            self._disk.remove(admission.evict_from_disk(self._pages, count, limit, Reason.TTL))

    def clear(self) -> None:
        """Remove every page from the disk; the remote store keeps its pages. Walks all pages."""
        if self._disk is not None:
            self._pages.stats.left("disk", Reason.FLUSH, self._pages.on_disk.pages)
            rows = self._pages.rows_on_disk()
            self._disk.remove([slot for row in rows for slot in self._pages.leave_disk(row)])

    def flush(self, timeout: float) -> int:
        """Write and share pending pages for at most `timeout` seconds; returns the pages not written to disk."""
        deadline = time.monotonic() + timeout
        left = 0 if self.to_disk is None else self.to_disk.flush(timeout)
        if self.to_remote is not None:
            self.to_remote.flush(deadline - time.monotonic())
        return left

    def wait(self, timeout: float) -> frozenset[str]:
        """Release everything held for requests, and wait until no tier touches a page of the arena.

        Returns the tiers that still do after `timeout` seconds. If there are any, nothing more is done.
        """
        self.fetch.release_all()
        running = self._running()
        wait([future for futures in running.values() for future in futures], timeout)
        stuck = {tier for tier, futures in running.items() if not all(future.done() for future in futures)}
        if not stuck:
            self.settle()
        return frozenset(stuck)

    def _running(self) -> dict[str, list[Future[Any]]]:
        """Per tier: its transfers that may not have ended."""
        running: dict[str, list[Future[Any]]] = {"disk": [], "remote": []}
        for writer in self._writers:
            running[writer.name] += writer.futures
        for tier, read in self.fetch.reads:
            running[tier].append(read)
        return {tier: [one for one in every if not one.cancelled()] for tier, every in running.items()}

    def settle(self) -> None:
        """Process all transfers that have ended; reads that have not will never be waited for."""
        self.fetch.settle()
        for writer in self._writers:
            writer.settle()

    def abandon(self, stuck: frozenset[str], host: HostTier, waited: float) -> None:
        """Close the tiers `stuck`, which have not answered for `waited` seconds. Nothing else may follow.

        `host` loses the slots that they may still write to.
        """
        slots = self.fetch.slots_in_flight
        logger.error(
            "CachedAttention: no answer from %s for %.0f s. The server goes on without that and without %d pages"
            " of host memory; what it holds stays there. Restart the server to use it again.",
            " and ".join(sorted(stuck)),
            waited,
            len(slots),
        )
        host.retire(slots)
        for name, tier in (("disk", self._disk), ("remote", self._remote)):
            if tier is not None and name in stuck:
                tier.close(0.0)
        self.settle()
        for writer in self._writers:
            if writer.name in stuck:
                writer.abandon()
        if "remote" in stuck:
            self._pages.remote.clear()
