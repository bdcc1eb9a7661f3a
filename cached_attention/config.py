"""Operator settings, parsed and validated once."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from enum import StrEnum
from typing import Any, TypedDict

DEFAULT_PAGE_SIZE = 64
"""Tokens per page unless the operator gives `--page-size`."""

DEFAULT_LOOK_AHEAD = 1024
"""Number of waiting requests; the pages held for them are also bounded by the size of the host tier."""

DEFAULT_TRUNCATION_RATIO = 0.5
DEFAULT_SINK_PAGES = 1


class ConfigError(ValueError):
    """A setting is wrong; the message says what was given, what is allowed and what to do."""


class Wait(StrEnum):
    """How long a request is held for pages being fetched from disk or the remote store, a few seconds at most."""

    MEASURED = "measured"
    """As long as fetching is expected to be faster than recomputing: lowest TTFT."""
    COMPLETE = "complete"
    """Until all of them have been fetched: least work for the device."""


class Eviction(StrEnum):
    """Eviction order of pages that no waiting request needs."""

    LEARNT = "learnt"
    """Latest expected next use first, learnt from the gaps between past turns."""
    LRU = "lru"
    """Least recently used first."""


class Policies(TypedDict):
    """Options of a store for fetching, eviction and waiting, see `CachedAttentionStore`."""

    min_uses: int
    ttl: float | None
    look_ahead: int
    wait: Wait
    eviction: Eviction


@dataclass(frozen=True)
class CachedAttentionConfig:
    """Settings of one server; plain values only, so that they reach every process as JSON."""

    host_size: int
    """Bytes of host memory for pages, over all ranks of the machine."""
    disk_path: str | None = None
    """Directory of the disk tier; None: no disk tier."""
    disk_size: int = 0
    """Upper limit of the disk tier in bytes, over all ranks of the machine."""
    encryption_key: str | None = None
    """Location of the key for disk and remote tier, see `cached_attention.encryption.key_place`; None: no key."""
    remote: str | None = None
    """URL of a store shared with other servers, see `parse_remote`; None: no remote tier."""
    disk_min_uses: int = 1
    """Number of uses after which a page is written to disk."""
    look_ahead: int = DEFAULT_LOOK_AHEAD
    """Number of waiting requests whose pages are fetched to host memory before they run."""
    wait: Wait = Wait.MEASURED
    """How long a request waits for pages from disk and remote store."""
    eviction: Eviction = Eviction.LEARNT
    """Eviction order of a tier's pages where the queue does not decide."""
    ttl: float = 3600.0
    """Seconds since its last use after which a page is dropped; 0: never."""
    truncation_ratio: float = DEFAULT_TRUNCATION_RATIO
    """Share of the context window dropped at a time from a prompt that outgrew it."""
    sink_pages: int = DEFAULT_SINK_PAGES
    """Pages kept at the start of such a prompt."""

    @classmethod
    def from_settings(cls, settings: Mapping[str, Any]) -> CachedAttentionConfig:
        """The inverse of `to_settings`.

        Raises:
            ConfigError: a name is unknown or missing.
        """
        names = {field.name for field in fields(cls)}
        if settings.keys() != names:
            raise ConfigError(f"settings are {sorted(settings)}; they must be {sorted(names)}.")
        return cls(**{**settings, "wait": Wait(settings["wait"]), "eviction": Eviction(settings["eviction"])})

    def to_settings(self) -> dict[str, Any]:
        return asdict(self)
