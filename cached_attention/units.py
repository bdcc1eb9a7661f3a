"""Sizes, durations and shares, as operators write them."""

from __future__ import annotations

import re

from cached_attention.config import ConfigError

_UNITS = {"": 1, "B": 1}
for _power, _letter in enumerate("KMGT", 1):
    _UNITS |= {_letter: 1000**_power, f"{_letter}B": 1000**_power}
    _UNITS |= {f"{_letter}I": 1024**_power, f"{_letter}IB": 1024**_power}
LEAST_BYTES = 1 << 16
"""Smallest size that may be given without a unit."""
_SIZE = re.compile(r"([0-9]*\.?[0-9]+)\s*([A-Z]*)", re.IGNORECASE)


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
    there = "are free" if most is None else "are there"
    most = available if most is None else most
    size = number * available if not unit and number < 1 else number * _UNITS[unit]
    if size < 1:
        full = " of what is free, and nothing is" if number and not unit else ""
        raise ConfigError(f"{flag} is {text!r}{full}: it must be above zero.")
    if size > most:
        raise ConfigError(
            f"{flag} is {text!r}, but only {format_size(most)} {there}: "
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
