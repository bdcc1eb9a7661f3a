"""Operator settings, parsed and validated once."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from enum import StrEnum
from typing import Any

_UNITS = {"": 1, "B": 1}
for _power, _letter in enumerate("KMGT", 1):
    _UNITS |= {_letter: 1000**_power, f"{_letter}B": 1000**_power}
    _UNITS |= {f"{_letter}I": 1024**_power, f"{_letter}IB": 1024**_power}
LEAST_BYTES = 1 << 16
"""Smallest size that may be given without a unit."""
_SIZE = re.compile(r"([0-9]*\.?[0-9]+)\s*([A-Z]*)", re.IGNORECASE)

DEFAULT_PAGE_SIZE = 64
"""Tokens per page unless the operator gives `--page-size`."""


DEFAULT_LOOK_AHEAD = 1024
"""Number of waiting requests; the pages held for them are also bounded by the size of the host tier."""

DEFAULT_TRUNCATION_RATIO = 0.5
DEFAULT_SINK_PAGES = 1


class ConfigError(ValueError):
    """A setting is wrong; the message says what was given, what is allowed and what to do."""


def parse_size(flag: str, text: str | int | float, available: int, most: int | None = None) -> int:
    """Size in bytes given by `text`: `"8GB"`, `"512MiB"`, a number of bytes, or a share such as `"0.5"`.

    A number from 0 to 1 is a share of `available` (bytes free on this machine now). Numbers without a unit from 1
    to `LEAST_BYTES` are refused: they are likely meant to be gigabytes.

    Args:
        most: most bytes that may be given; `available` by default.

    Raises:
        ConfigError: not a size, not above zero, or more than `most`.
    """
    match = _SIZE.fullmatch(str(text).strip())
    if match is None or match[2].upper() not in _UNITS:
        raise ConfigError(
            f"{flag} is {text!r}: give a size such as 8GB (units: B, KB to TB, KiB to TiB), or a share of "
            "what is free such as 0.5."
        )
    number, unit = float(match[1]), match[2].upper()
    if not unit and 1 <= number < LEAST_BYTES:
        raise ConfigError(f"{flag} is {text!r}: give a unit, such as {text}GB, or a share below 1 such as 0.5.")
    most = available if most is None else most
    size = number * available if not unit and number < 1 else number * _UNITS[unit]
    if size < 1:
        full = " of what is free, and nothing is" if number and not unit else ""
        raise ConfigError(f"{flag} is {text!r}{full}: it must be above zero.")
    if size > most:
        raise ConfigError(
            f"{flag} is {text!r}, but only {format_size(most)} are free: "
            f"give at most that, or a share such as 0.5."
        )
    return int(size)


_DURATIONS = {"": 1, "S": 1, "M": 60, "H": 3600, "D": 86400, "W": 604800}
_DURATION = re.compile(r"([0-9]*\.?[0-9]+)\s*([A-Z]?)", re.IGNORECASE)


def parse_duration(flag: str, text: str | int | float) -> float:
    """Duration in seconds given by `text`: `"1h"`, `"90s"`, `"30m"`, `"2d"`, `"2w"` or a number of seconds.

    Raises:
        ConfigError: not a duration.
    """
    match = _DURATION.fullmatch(str(text).strip())
    if match is None or match[2].upper() not in _DURATIONS:
        raise ConfigError(f"{flag} is {text!r}: give a duration such as 1h, 30m or 90s, or 0 for none.")
    return float(match[1]) * _DURATIONS[match[2].upper()]


def format_size(size: float) -> str:
    """Format `size` (bytes) with a decimal unit: 1500000000 -> '1.5 GB'."""
    for unit in ("B", "KB", "MB", "GB"):
        if abs(size) < 1000:
            return f"{size:.3g} {unit}"
        size /= 1000
    return f"{size:.4g} TB"


class Wait(StrEnum):
    """How long a request is held for pages being fetched from disk, a few seconds at most."""

    MEASURED = "measured"
    """As long as fetching is expected to be faster than recomputing: lowest TTFT."""
    COMPLETE = "complete"
    """Until all of them have been fetched: least work for the device."""


def parse_share(flag: str, text: str | float) -> float:
    """Share of a whole given by `text`, such as `"0.5"`.

    Raises:
        ConfigError: not a number above 0 and below 1.
    """
    try:
        share = float(text)
    except ValueError:
        share = 0.0
    if not 0 < share < 1:
        raise ConfigError(f"{flag} is {text!r}: give a number above 0 and below 1, such as 0.5.")
    return share


class Eviction(StrEnum):
    """Eviction order of pages that no waiting request needs."""

    LEARNT = "learnt"
    """Latest expected next use first, learnt from the gaps between past turns."""
    LRU = "lru"
    """Least recently used first."""


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
    """How long a request waits for pages from the disk."""
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
