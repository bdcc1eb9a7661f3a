"""Checksums of page records."""

from __future__ import annotations

from xxhash import xxh3_64


def record_checksum(key: bytes, record: memoryview) -> int:
    """xxh3 over the page key and the record's bytes."""
    digest = xxh3_64(key)
    digest.update(record)
    return digest.intdigest()
