"""What `--cached-attention-remote` may be."""

from __future__ import annotations

import pytest

from cached_attention.config import ConfigError
from cached_attention.tiers.remote_address import RemoteAddress, parse_remote

FREE = 100 * 10**9


def parse(text: str) -> RemoteAddress:
    return parse_remote("--remote", text, FREE)


def test_the_shortest_form() -> None:
    address = parse("mooncake://10.0.0.1:50051")
    assert address == RemoteAddress("10.0.0.1", 50051, 4 * 10**9)
    assert (address.master, address.protocol, address.metadata) == ("10.0.0.1:50051", "tcp", "P2PHANDSHAKE")


@pytest.mark.parametrize(
    "text",
    [
        "mooncake://master:50051?segment=0",
        "mooncake://master:50051?segment=0.5&protocol=rdma&device=mlx5_0,mlx5_1&host=10.0.0.7",
        "mooncake://[fd00::1]:50051?metadata=http://meta:8080/metadata",
    ],
)
def test_the_url_says_the_same(text: str) -> None:
    address = parse(text)
    assert parse_remote("--remote", address.url) == address


def test_a_share_is_of_the_free_memory() -> None:
    assert parse("mooncake://m:1?segment=0.5").segment == FREE // 2


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("10.0.0.1:50051", "give mooncake://HOST:PORT"),
        ("redis://m:1", "give mooncake://HOST:PORT"),
        ("mooncake://m", "give mooncake://HOST:PORT"),
        ("mooncake://:50051", "give mooncake://HOST:PORT"),
        ("mooncake://m:port", "give mooncake://HOST:PORT"),
        ("mooncake://m:70000", "give mooncake://HOST:PORT"),
        ("mooncake://m:1/store", "give mooncake://HOST:PORT"),
        ("mooncake://m:1?size=1GB", "the option 'size'"),
        ("mooncake://m:1?device=", "no value for 'device'"),
        ("mooncake://m:1?segment=1GB&segment=2GB", "each option once"),
        ("mooncake://m:1?protocol=udp", "give tcp or rdma"),
        ("mooncake://m:1?segment=much", "give a size such as 8GB"),
        ("mooncake://m:1?segment=1MB", "at least 16MiB"),
        ("mooncake://m:1?segment=200GB", "only 100 GB are free"),
    ],
)
def test_what_is_wrong_is_said_in_one_sentence(text: str, says: str) -> None:
    with pytest.raises(ConfigError, match="--remote") as error:
        parse(text)
    assert says in str(error.value)
    assert "\n" not in str(error.value)
