"""AES-256-GCM for the records of one store, with keys that are never used too often."""

from __future__ import annotations

import os
from functools import lru_cache
from itertools import count
from typing import TYPE_CHECKING, NamedTuple

from cached_attention.encryption import EncryptionKey
from cached_attention.fingerprint import Fingerprint

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.ciphers.aead import AESGCM

EPOCH_BYTES = 16
NONCE_BYTES = 12
TAG_BYTES = 16
EPOCH_RECORDS = 1 << 24
"""Records under one key: the chance that two random nonces of 96 bits are equal stays below 2^-49."""
_EPOCHS_AT_HAND = 1024


class Epoch(NamedTuple):
    name: bytes
    """`EPOCH_BYTES` random bytes that the key was derived with; stored with every record."""
    cipher: AESGCM


class StoreCipher:
    """Seals one kind of record of one store; any thread.

    Each opening of a store, and each `EPOCH_RECORDS` records, begin an epoch with a key of its own. So neither
    a counter that is lost nor a restored backup can bring a nonce back under a key that has seen it.

    Args:
        kind: of the records: what seals one kind does not open another.
    """

    def __init__(self, key: EncryptionKey, fingerprint: Fingerprint, kind: str) -> None:
        self.context = b"%s %d " % (kind.encode(), fingerprint.format_version)
        self.context += bytes.fromhex(fingerprint.digest())
        """Goes into the associated data of every record: kind, format version, fingerprint."""
        self._key = key
        self.of_epoch = lru_cache(_EPOCHS_AT_HAND)(self._derive)
        """The cipher of an epoch, by its name."""
        self._begin()

    def sealing(self) -> tuple[Epoch, bytes]:
        """The epoch and the fresh nonce to seal one record with."""
        epoch, used = self._present
        if next(used) >= EPOCH_RECORDS:
            self._begin()
        return epoch, os.urandom(NONCE_BYTES)

    def _begin(self) -> None:
        name = os.urandom(EPOCH_BYTES)
        self._present = Epoch(name, self._derive(name)), count(1)

    def _derive(self, epoch: bytes) -> AESGCM:
        return self._key.cipher(self.context + epoch)
