"""How a store keeps pages and their metadata: unencrypted or encrypted."""

from __future__ import annotations

from typing import NamedTuple

from cached_attention.encryption import EncryptionKey
from cached_attention.fingerprint import Fingerprint
from cached_attention.tiers.cipher import StoreCipher
from cached_attention.tiers.disk_records import PlainRecords, Records, SealedRecords
from cached_attention.tiers.disk_rows import PlainRows, Rows, SealedRows
from cached_attention.tiers.disk_space import slot_stride


class StoreFormat(NamedTuple):
    rows: Rows
    records: Records | None
    """None: reading them needs the key."""
    stride: int
    """Bytes per slot."""


def store_format(fingerprint: Fingerprint, key: EncryptionKey | None) -> StoreFormat:
    """Format of the store of `fingerprint`; it can be read if it is not encrypted or `key` is its key."""
    if fingerprint.encryption is None:
        plain = PlainRecords(fingerprint.page_bytes)
        return StoreFormat(PlainRows(), plain, plain.stride)
    if key is None or key.id != fingerprint.encryption:
        return StoreFormat(SealedRows(None), None, slot_stride(SealedRecords.bytes_for(fingerprint.page_bytes)))
    sealed = SealedRecords(fingerprint.page_bytes, StoreCipher(key, fingerprint, "page"))
    return StoreFormat(SealedRows(StoreCipher(key, fingerprint, "row")), sealed, sealed.stride)
