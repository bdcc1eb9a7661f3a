"""Reports pages that become usable in our tiers, or leave them, as SGLang's KV events."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterable, Sequence

from sglang.srt.disaggregation.kv_events import BlockRemoved, BlockStored, StorageMedium
from sglang.srt.mem_cache.cache_init_params import CacheInitParams
from sglang.srt.mem_cache.radix_cache import RadixKey

from cached_attention.index import PageKey
from cached_attention.residency import ResidencyFeed, ResidentPage

from .block_names import BlockNames, block_hash

MEDIUM = {
    "host": StorageMedium.CPU,
    "disk": StorageMedium.DISK,
    "remote": StorageMedium.EXTERNAL,
}
"""SGLang's name of each tier."""
BATCH_BLOCKS = 1024
"""Maximum number of blocks per `take`, rounded up to a whole event: 10^6 adopted pages take a thousand calls."""
EVENT_BLOCKS = 256
"""Maximum number of blocks in one event."""
REPEATED_BLOCKS = 256
"""Places that are walked at a time when stored blocks are reported again."""
REPEAT_PAUSE = 0.25
"""Seconds between two such steps."""
REPEAT_EVERY = 600.0
"""Minimum number of seconds from the start of one round over all pages to that of the next."""


class KvEvents:
    """The tiers' part of the events that a scheduler publishes. All calls come from the scheduler's thread.

    What subscribers cannot have heard is reported a little at a time: pages that the disk held when it was
    opened, and, in rounds, everything that is stored, for subscribers that join late or have missed more than
    SGLang's replay buffer holds. Reporting a stored block twice does no harm.

    Args:
        clock: seconds.
    """

    def __init__(
        self, feed: ResidencyFeed, params: CacheInitParams, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._feed = feed
        self._page_size = params.page_size
        self._clock = clock
        self.names = BlockNames(params, feed.is_known)
        self._queue: deque[BlockStored | BlockRemoved] = deque()
        self.cleared()
        feed.observer = self

    def cleared(self) -> None:
        # SGLang publishes AllBlocksCleared itself: the store is emptied together with the tree above it.
        self._queue.clear()
        self._walked = 0
        self._is_adopting = True
        self._round_started = self._repeated = self._clock()

    def learn(self, keys: Sequence[PageKey], prompt: RadixKey) -> None:
        """`keys` are the keys of the pages of `prompt`, from its start: learn SGLang's names for them.

        Must be called before they enter a tier.
        """
        for key in self.names.learn(keys, prompt):
            for page in self._feed.tiers_of(key):
                self._remove(page.tier, block_hash(key))
                self._store(page)

    def entered(self, page: ResidentPage) -> None:
        if not self._has_namesake(page.tier, page.key):
            self._store(page)

    def left(self, tier: str, key: PageKey) -> None:
        if not self._has_namesake(tier, key):
            self._remove(tier, self.names.name(key).block_hash)

    def _has_namesake(self, tier: str, key: PageKey) -> bool:
        """Whether another page with the same block hash is in the tier."""
        namesakes = self.names.namesakes(key)
        return any(page.tier == tier for other in namesakes for page in self._feed.tiers_of(other))

    def _store(self, page: ResidentPage) -> None:
        name, tokens, medium = self.names.name(page.key), self.names.tokens(page.key), MEDIUM[page.tier]
        parent = None if page.parent is None else self.names.name(page.parent).block_hash
        size = 0 if tokens is None else self._page_size
        last = self._queue[-1] if self._queue else None
        if (
            isinstance(last, BlockStored)
            and len(last.block_hashes) < EVENT_BLOCKS
            and last.block_hashes[-1] == parent
            and (last.medium, last.block_size) == (medium, size)
            and (last.cache_salt, last.lora_name) == (name.cache_salt, name.lora_name)
        ):
            last.block_hashes.append(name.block_hash)
            last.token_ids.extend(tokens or ())
            return
        self._queue.append(
            BlockStored(
                block_hashes=[name.block_hash],
                parent_block_hash=parent,
                token_ids=list(tokens or ()),
                block_size=size,
                lora_id=None,
                medium=medium,
                cache_salt=name.cache_salt,
                lora_name=name.lora_name,
            )
        )

    def _remove(self, tier: str, block_hash: int) -> None:
        medium, last = MEDIUM[tier], self._queue[-1] if self._queue else None
        if isinstance(last, BlockRemoved) and last.medium == medium and len(last.block_hashes) < EVENT_BLOCKS:
            last.block_hashes.append(block_hash)
        else:
            self._queue.append(BlockRemoved([block_hash], medium))

    def take(self) -> list[BlockStored | BlockRemoved]:
        """The events to publish now, oldest first: up to `BATCH_BLOCKS` blocks, rounded up to a whole event."""
        events, room = self._take(BATCH_BLOCKS)
        if room > 0:
            self._tell_again()
            events += self._take(room)[0]
        return events

    def _take(self, room: int) -> tuple[list[BlockStored | BlockRemoved], int]:
        events: list[BlockStored | BlockRemoved] = []
        while self._queue and room > 0:
            events.append(self._queue.popleft())
            room -= len(events[-1].block_hashes)
        return events, room

    def _tell_again(self) -> None:
        now = self._clock()
        if self._walked >= (self._feed.adopted if self._is_adopting else self._feed.end):
            self._is_adopting = False
            if now < self._round_started + REPEAT_EVERY:
                return
            self._walked, self._round_started = 0, now
        if not self._is_adopting and now < self._repeated + REPEAT_PAUSE:
            return
        rows = BATCH_BLOCKS if self._is_adopting else REPEATED_BLOCKS
        for page in in_chains(self._feed.walk(self._walked, rows)):
            self._store(page)
        self._walked += rows
        self._repeated = now


def in_chains(pages: Iterable[ResidentPage]) -> Iterable[ResidentPage]:
    """The same pages, each after its predecessor if that is among them, so that one event reports a chain."""
    found: dict[tuple[str, PageKey | None], ResidentPage] = {(page.tier, page.key): page for page in pages}
    after = {(page.tier, page.parent): page for page in found.values()}
    for page in list(found.values()):
        if (page.tier, page.parent) in found and after[page.tier, page.parent] is page:
            continue
        following: ResidentPage | None = page
        while following is not None:
            yield following
            following = after.get((following.tier, following.key))
