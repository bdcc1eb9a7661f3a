"""AES-256-GCM for the records of one store; no key encrypts too many of them."""

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
"""Records per key: the probability that two random 96-bit nonces are equal stays below 2^-49."""
_EPOCHS_AT_HAND = 1024


class Epoch(NamedTuple):
    name: bytes
    """`EPOCH_BYTES` random bytes that the key was derived with; stored with every record."""
    cipher: AESGCM


class StoreCipher:
    """Encrypts one kind of record of one store; any thread.

    Each opening of a store, and every `EPOCH_RECORDS` records, start an epoch with its own key. So neither a lost
    counter nor a restored backup can repeat a nonce under the same key.

    Args:
        kind: kind of the records; one kind cannot be decrypted as another.
    """

    def __init__(self, key: EncryptionKey, fingerprint: Fingerprint, kind: str) -> None:
        self.context = b"%s %d " % (kind.encode(), fingerprint.format_version)
        self.context += bytes.fromhex(fingerprint.digest())
        """Part of the associated data of every record: kind, format version, fingerprint."""
        self._key = key
        self.of_epoch = lru_cache(_EPOCHS_AT_HAND)(self._derive)
        """Cipher of the epoch with this name."""
        self._begin()

    def sealing(self) -> tuple[Epoch, bytes]:
        """Epoch and fresh nonce for encrypting one record."""
        epoch, used = self._present
        if next(used) >= EPOCH_RECORDS:
            self._begin()
        return epoch, os.urandom(NONCE_BYTES)

    def _begin(self) -> None:
        name = os.urandom(EPOCH_BYTES)
        self._present = Epoch(name, self._derive(name)), count(1)

    def _derive(self, epoch: bytes) -> AESGCM:
        return self._key.cipher(self.context + epoch)
