"""Sizes as operators write them, and settings on their way between processes."""

from __future__ import annotations

import pytest

from cached_attention.config import CachedAttentionConfig, ConfigError, Wait
from cached_attention.units import format_size, parse_duration, parse_size

FREE = 10**12


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("8GB", 8 * 10**9),
        ("8 gb", 8 * 10**9),
        ("1.5GiB", 3 * 2**29),
        ("512MiB", 2**29),
        ("0.5", FREE // 2),
        (0.25, FREE // 4),
        (123456, 123456),
        ("123456", 123456),
        ("0.5GB", 5 * 10**8),
        ("2G", 2 * 10**9),
        ("2Gi", 2 * 2**30),
    ],
)
def test_sizes(text: str, size: int) -> None:
    assert parse_size("--size", text, FREE) == size


@pytest.mark.parametrize("text", ["", "GB", "8XB", "-1", "-8GB", "eight", "1e9", "0x10", "8GB!", "nan", None])
def test_what_is_not_a_size(text: str) -> None:
    with pytest.raises(ConfigError, match=r"--size is .*: give a size such as 8GB \(units: .*\), or a share"):
        parse_size("--size", text, FREE)


@pytest.mark.parametrize("text", ["1", "64", 64, "1.0", "65535"])
def test_numbers_that_may_be_gigabytes(text: str) -> None:
    with pytest.raises(ConfigError, match=rf"--size is '?{text}'?: give a unit, such as {text}GB"):
        parse_size("--size", text, FREE)


@pytest.mark.parametrize("text", ["0", "0GB", "0.0", 0])
def test_zero(text: str) -> None:
    with pytest.raises(ConfigError, match="must be above zero"):
        parse_size("--size", text, FREE)


def test_a_share_of_nothing() -> None:
    with pytest.raises(ConfigError, match=r"'0\.5' of what is free, and nothing is: it must be above zero\.$"):
        parse_size("--size", "0.5", 0)


def test_more_than_is_free_where_more_may_be_given() -> None:
    assert parse_size("--size", "1.5TB", FREE, most=2 * FREE) == 15 * FREE // 10
    with pytest.raises(ConfigError, match="'3TB', but only 2 TB are there"):
        parse_size("--size", "3TB", FREE, most=2 * FREE)


def test_more_than_there_is() -> None:
    with pytest.raises(ConfigError, match="are free"):
        parse_size("--size", 400 * "9", FREE)
    with pytest.raises(ConfigError, match="'2TB', but only 1 TB are free"):
        parse_size("--size", "2TB", FREE)


def test_words_for_sizes() -> None:
    assert [format_size(n) for n in (1, 1500, 131072, 64 * 10**9, 2.5 * 10**12)] == [
        "1 B",
        "1.5 KB",
        "131 KB",
        "64 GB",
        "2.5 TB",
    ]


def test_settings_travel() -> None:
    config = CachedAttentionConfig(host_size=5, wait=Wait.COMPLETE)
    assert CachedAttentionConfig.from_settings(config.to_settings()) == config
    with pytest.raises(ConfigError, match="they must be"):
        CachedAttentionConfig.from_settings({"hostsize": 5})


@pytest.mark.parametrize(
    ("text", "seconds"),
    [("1h", 3600), ("30m", 1800), ("90s", 90), ("90", 90), (0, 0), ("1.5H", 5400), ("2d", 172800)],
)
def test_durations(text: str, seconds: float) -> None:
    assert parse_duration("--ttl", text) == seconds


@pytest.mark.parametrize("text", ["", "h", "-1h", "1 week", "1y", None])
def test_what_is_not_a_duration(text: str) -> None:
    with pytest.raises(ConfigError, match=r"--ttl is .*: give a duration such as 1h"):
        parse_duration("--ttl", text)
