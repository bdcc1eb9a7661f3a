"""Address of a remote store, and what this server lends to it."""

from __future__ import annotations

import sys
from typing import NamedTuple
from urllib.parse import parse_qsl, urlencode, urlsplit

from cached_attention.config import ConfigError
from cached_attention.units import parse_size

DEFAULT_SEGMENT = "4GB"
LEAST_SEGMENT = 16 << 20
"""Bytes; Mooncake accepts no smaller segment."""
PROTOCOLS = ("tcp", "rdma")
_FORM = "mooncake://HOST:PORT[?segment=SIZE&protocol=tcp|rdma&device=NAME&metadata=URL&host=ADDRESS]"
_OPTIONS = ("device", "host", "metadata", "protocol", "segment")


class RemoteAddress(NamedTuple):
    """A Mooncake master, and how this server takes part in its store."""

    host: str
    """Host of the master."""
    port: int
    segment: int
    """Bytes of this machine's memory that the store may use for any server's pages; 0: none."""
    protocol: str = "tcp"
    device: str = ""
    """RDMA devices, separated by commas; empty: those that Mooncake finds."""
    metadata: str = "P2PHANDSHAKE"
    """How the transfer engines find each other: a metadata server's URL, or peer to peer."""
    own_host: str | None = None
    """Address at which other servers reach this one; None: the local address of its connection to the master."""

    @property
    def master(self) -> str:
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"

    @property
    def url(self) -> str:
        """The inverse of `parse_remote`, with defaults and shares resolved."""
        given = {"protocol": self.protocol, "device": self.device, "metadata": self.metadata}
        options = {**given, "host": self.own_host, "segment": str(self.segment)}
        query = urlencode({name: value for name, value in options.items() if value})
        return f"mooncake://{self.master}?{query}"


def parse_remote(flag: str, text: str, available: int = sys.maxsize) -> RemoteAddress:
    """Parse an address such as `mooncake://10.0.0.1:50051?segment=64GB&protocol=rdma`.

    Args:
        available: bytes of memory free on this machine now, of which a segment may be a share.

    Raises:
        ConfigError: `text` does not have that form, or asks for more memory than is available.
    """
    url = urlsplit(text)
    if url.scheme != "mooncake" or not url.hostname or url.path not in ("", "/") or (port := _port(text)) is None:
        raise ConfigError(f"{flag} is {text!r}: give {_FORM}.")
    pairs = parse_qsl(url.query, keep_blank_values=True)
    options = dict(pairs)
    for name, value in pairs:
        if name not in _OPTIONS:
            raise ConfigError(f"{flag} has the option {name!r}: those that there are {', '.join(_OPTIONS)}.")
        if not value:
            raise ConfigError(f"{flag} has no value for {name!r}: give one, or leave it out.")
    if len(options) < len(pairs):
        raise ConfigError(f"{flag} is {text!r}: give each option once.")
    protocol = options.get("protocol", "tcp")
    if protocol not in PROTOCOLS:
        raise ConfigError(f"{flag} has the protocol {protocol!r}: give {' or '.join(PROTOCOLS)}.")
    size = options.get("segment", DEFAULT_SEGMENT)
    segment = 0 if size == "0" else parse_size(f"{flag} segment", size, available)
    if 0 < segment < LEAST_SEGMENT:
        raise ConfigError(
            f"{flag} segment is {size!r}: give at least {LEAST_SEGMENT >> 20}MiB, or 0 to lend none."
        )
    return RemoteAddress(
        url.hostname,
        port,
        segment,
        protocol,
        options.get("device", ""),
        options.get("metadata", "P2PHANDSHAKE"),
        options.get("host"),
    )


def _port(text: str) -> int | None:
    try:
        return urlsplit(text).port or None
    except ValueError:
        return None
