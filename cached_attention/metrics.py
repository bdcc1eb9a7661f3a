"""Metrics of the store that a server publishes under `/metrics`: names, meanings, and where values come from."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import TYPE_CHECKING, NamedTuple

from cached_attention.stats import Direction, Reason, StoreStats

if TYPE_CHECKING:
    from cached_attention.store import CachedAttentionStore

PREFIX = "sglang:cached_attention_"
OWN_TIERS = ("host", "disk")
"""Tiers that belong to this server alone, so that it knows how full they are."""
LOWER_TIERS = ("disk", "remote")
"""Tiers below host memory, fastest first."""

Values = Mapping[tuple[str, ...], float]
"""Value per combination of label values."""


class Kind(StrEnum):
    COUNTER = "counter"
    GAUGE = "gauge"
    HISTOGRAM = "histogram"


class Reading(NamedTuple):
    """Counters of a store at one moment."""

    stats: StoreStats
    counters: Mapping[str, int]
    """See `CachedAttentionStore.counters`."""
    page_bytes: int
    has_had: frozenset[str]
    """Tiers that the server was started with or has had since."""
    configured: frozenset[str]
    """Tiers that it is meant to have now."""

    def fill(self, key: str, scale: int = 1) -> Values:
        """Per own tier: the counter `{tier}_{key}` times `scale`; 0 for a tier that no longer exists."""
        own = (tier for tier in OWN_TIERS if tier in self.has_had)
        return {(tier,): self.counters.get(f"{tier}_{key}", 0) * scale for tier in own}

    def below(self, key: str) -> Values:
        """Like `fill`, for the tiers below host memory."""
        return {(tier,): self.counters.get(f"{tier}_{key}", 0) for tier in self.has_had if tier in LOWER_TIERS}


@dataclass(frozen=True)
class Metric:
    """One family of time series.

    Args:
        name: without prefix; counters end in `_total`.
        read: its values; none for a histogram, whose observations are recorded one by one.
    """

    name: str
    kind: Kind
    help: str
    labels: tuple[str, ...] = ()
    read: Callable[[Reading], Values] = lambda reading: {}
    buckets: tuple[float, ...] = ()

    @property
    def full_name(self) -> str:
        return PREFIX + self.name


def _counter(name: str, help: str, count: Callable[[Reading], float]) -> Metric:
    return Metric(name, Kind.COUNTER, help, (), lambda reading: {(): count(reading)})


def _gauge(name: str, help: str, value: Callable[[Reading], float]) -> Metric:
    return Metric(name, Kind.GAUGE, help, (), lambda reading: {(): value(reading)})


def _by_tier(name: str, help: str, read: Callable[[Reading], Values], kind: Kind = Kind.GAUGE) -> Metric:
    return Metric(name, kind, help, ("tier",), read)


def _healthy(reading: Reading) -> Values:
    no_longer_there = reading.has_had - reading.configured
    return {**reading.below("healthy"), **{(tier,): 1 for tier in no_longer_there}}


def _hits(reading: Reading) -> Values:
    tiers = ("device", "host", *LOWER_TIERS)
    return {
        (tier,): reading.stats.hit_tokens[tier] for tier in tiers if tier == "device" or tier in reading.has_had
    }


def _moved(field: str) -> Callable[[Reading], Values]:
    def read(reading: Reading) -> Values:
        scale = reading.page_bytes if field == "bytes" else 1
        flows = reading.stats.flows.copy().items()
        return dict.fromkeys(moves(reading.has_had), 0) | {
            (str(direction), tier): flow.pages * scale for (direction, tier), flow in flows
        }

    return read


def moves(tiers: Iterable[str]) -> Iterator[tuple[str, ...]]:
    """The directions in which pages are moved to and from `tiers`, with the tier.

    All are published from the start: a rate does not see how a series that is new came to its first value.
    """
    for tier in tiers:
        ways = (Direction.SAVE, Direction.LOAD) if tier == "host" else (Direction.DEMOTE, Direction.FETCH)
        yield from ((str(way), tier) for way in ways)


def _gone(reading: Reading) -> Values:
    own, gone = (tier for tier in OWN_TIERS if tier in reading.has_had), reading.stats.gone
    return {(tier, str(reason)): gone[tier, reason] for tier in own for reason in Reason}


SECONDS = (0.0001, 0.0003, 0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0)
MOVES = ("direction", "tier")

TRANSFER_SECONDS = Metric(
    "transfer_seconds",
    Kind.HISTOGRAM,
    "Seconds from when a transfer was asked for until it had landed, waiting for others included. "
    "Directions as in transfer_bytes_total.",
    MOVES,
    buckets=SECONDS,
)
LOAD_WAIT_SECONDS = Metric(
    "load_wait_seconds",
    Kind.HISTOGRAM,
    "Seconds that the forward of a batch waited for pages of its layers, added up over the layers: the part of "
    "loading that computing did not hide. Seen by the CPU: where a GPU's stream waits, it does not show.",
    buckets=SECONDS,
)

METRICS: tuple[Metric, ...] = (
    _counter("prompts_total", "Requests whose prompt ran.", lambda r: r.stats.prompts),
    _counter("prompt_tokens_total", "Tokens of those prompts.", lambda r: r.stats.prompt_tokens),
    _by_tier(
        "hit_tokens_total",
        "Of the prompts' tokens, those that were not computed, by the tier that they came from: "
        "device, host, or, when they were read for the request, disk or remote.",
        _hits,
        Kind.COUNTER,
    ),
    _by_tier(
        "capacity_bytes", "Bytes of pages that a tier can hold now.", lambda r: r.fill("pages", r.page_bytes)
    ),
    _by_tier("resident_bytes", "Bytes of pages in a tier.", lambda r: r.fill("pages_used", r.page_bytes)),
    _by_tier("capacity_pages", "Pages that a tier can hold now.", lambda r: r.fill("pages")),
    _by_tier(
        "resident_pages", "Pages in a tier, those on their way into it included.", lambda r: r.fill("pages_used")
    ),
    _by_tier(
        "tier_healthy",
        "0 while a tier that the server is meant to have is out of service, else 1.",
        _healthy,
    ),
    _by_tier("tier_errors_total", "I/O errors of a tier.", lambda r: r.below("errors"), Kind.COUNTER),
    _by_tier(
        "checksum_failures_total",
        "Pages that were read back from a tier and were not what was written: damaged, short or foreign.",
        lambda r: r.below("damaged"),
        Kind.COUNTER,
    ),
    Metric(
        "transfer_bytes_total",
        Kind.COUNTER,
        "Bytes of pages moved: save, device to host memory; load, host memory to device; demote, host memory to "
        "a tier below; fetch, back to host memory. The tier is the lower one.",
        MOVES,
        _moved("bytes"),
    ),
    Metric("transfer_pages_total", Kind.COUNTER, "The same in pages.", MOVES, _moved("pages")),
    TRANSFER_SECONDS,
    LOAD_WAIT_SECONDS,
    _counter(
        "declined_pages_total",
        "Pages not saved: host memory was full of pages in use, or the page before was not in the store.",
        lambda r: r.stats.declined,
    ),
    _counter("failed_pages_total", "Pages whose copy to host memory failed.", lambda r: r.stats.failed),
    _gauge(
        "dirty_pages",
        "Pages in host memory that are still to be written to disk.",
        lambda r: r.counters.get("dirty", 0),
    ),
    _counter(
        "aliased_pages_total",
        "Pages of truncated prompts that took the bytes of what they were before, at another position.",
        lambda r: r.counters["aliases"],
    ),
    Metric(
        "evicted_pages_total",
        Kind.COUNTER,
        "Pages that left a tier: room, others needed it; ttl, not used for longer than the time to live; hint, a "
        "client said so; damage, it was not what was written, or unreadable; flush, the cache was emptied.",
        ("tier", "reason"),
        _gone,
    ),
    _gauge(
        "waiting_requests",
        "Requests in the queue that the store knows, hints included.",
        lambda r: r.counters["waiting"],
    ),
    _gauge(
        "look_ahead_requests",
        "Waiting requests whose pages are on their way from a lower tier, or held in host memory.",
        lambda r: r.counters.get("look_ahead", 0),
    ),
    _counter(
        "recompute_decisions_total",
        "Requests that did not wait for the rest of their pages: computing them was expected to be quicker.",
        lambda r: r.stats.given_up,
    ),
    _counter("recomputed_pages_total", "Pages computed again by such requests.", lambda r: r.stats.recomputed),
    _counter(
        "truncated_prompts_total", "Prompts that outgrew the context window.", lambda r: r.stats.truncated_prompts
    ),
    _counter("truncated_tokens_total", "Tokens dropped from them.", lambda r: r.stats.truncated_tokens),
)


def read(store: CachedAttentionStore, has_had: frozenset[str], configured: frozenset[str]) -> Reading:
    """Runs in constant time, on the thread that calls the store."""
    return Reading(store.stats, store.counters(), store.layout.page_bytes, has_had, configured)


def tiers_of(store: CachedAttentionStore) -> frozenset[str]:
    """Host memory, and the lower tiers that the store has now."""
    below = {"disk": store.disk, "remote": store.remote}
    return frozenset({"host", *(tier for tier, opened in below.items() if opened is not None)})
