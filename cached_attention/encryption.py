"""The operator's key for encrypting the disk and remote tiers: where it comes from, and keys derived from it."""

from __future__ import annotations

import base64
import binascii
import os
import re
import stat
import string
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from cached_attention.config import ConfigError

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.ciphers.aead import AESGCM

KEY_VARIABLE = "CACHED_ATTENTION_ENCRYPTION_KEY"
IN_ENVIRONMENT = "environment"
"""Key location that stands for `KEY_VARIABLE`; a key file's location is its absolute path."""
KEY_BYTES = 32
FORMS = f"{KEY_BYTES} random bytes, as they are, as 64 hexadecimal digits or in base64"
MAKE_ONE = "`openssl rand -base64 32` makes a key"
_OTHERS = stat.S_IRWXO | stat.S_IWGRP | stat.S_IXGRP
_HEXADECIMAL = re.compile(rb"[0-9a-fA-F]{64}")
_BASE64 = re.compile(rb"[0-9a-zA-Z+/_-]{43}=?")


class EncryptionKey:
    """A 32-byte secret. Never encrypts anything itself: a separate key is derived for each purpose.

    Raises:
        ConfigError: not 32 bytes, or AES-GCM is not installed.
    """

    def __init__(self, secret: bytes) -> None:
        if len(secret) != KEY_BYTES:
            raise ConfigError(f"an encryption key has {KEY_BYTES} bytes, not {len(secret)}; {MAKE_ONE}.")
        _require_cryptography()
        self._secret = secret
        self.id = self.derive(b"key id")[:8].hex()
        """Identifies the key without revealing it: 16 hexadecimal digits."""

    def __repr__(self) -> str:
        return f"EncryptionKey(id={self.id})"

    def derive(self, purpose: bytes) -> bytes:
        """Derive the 32-byte key for `purpose` (HKDF-SHA256)."""
        from cryptography.hazmat.primitives.hashes import SHA256
        from cryptography.hazmat.primitives.kdf.hkdf import HKDF

        return HKDF(SHA256(), KEY_BYTES, salt=None, info=b"cached-attention: " + purpose).derive(self._secret)

    def cipher(self, purpose: bytes) -> AESGCM:
        """AES-256-GCM with the key derived for `purpose`."""
        from cryptography.hazmat.primitives.ciphers.aead import AESGCM

        return AESGCM(self.derive(purpose))


def key_place(flag: str, path: str | None, environment: Mapping[str, str] = os.environ) -> str | None:
    """Location of the operator's key: a file's absolute path, `IN_ENVIRONMENT`, or None.

    Raises:
        ConfigError: both a file and the environment variable are given.
    """
    if path is None:
        return IN_ENVIRONMENT if KEY_VARIABLE in environment else None
    if KEY_VARIABLE in environment:
        raise ConfigError(
            f"{flag} and ${KEY_VARIABLE} are both given: one key, one place; leave one of them out."
        )
    return str(Path(path).absolute())


def read_key(place: str, environment: Mapping[str, str] = os.environ) -> EncryptionKey:
    """Read the key at `place`, see `key_place`. Neither logs nor errors contain any part of it.

    Raises:
        ConfigError: the key is missing or malformed, or its file is unreadable or accessible to other users.
    """
    if place != IN_ENVIRONMENT:
        return EncryptionKey(_parse(f"the key file {place}", _read_file(Path(place))))
    if KEY_VARIABLE not in environment:
        raise ConfigError(f"${KEY_VARIABLE} is not set in this process: hand it on, or give the key in a file.")
    return EncryptionKey(_parse(f"${KEY_VARIABLE}", os.fsencode(environment[KEY_VARIABLE])))


def _read_file(path: Path) -> bytes:
    try:
        with open(path, "rb") as file:
            status = os.fstat(file.fileno())
            if not stat.S_ISREG(status.st_mode):
                raise ConfigError(f"the key file {path} is not a regular file: it is read more than once.")
            if status.st_mode & _OTHERS:
                raise ConfigError(
                    f"the key file {path} has mode {stat.S_IMODE(status.st_mode):04o}: others than its owner "
                    f"can use it; `chmod 600 {path}` (in Kubernetes: defaultMode 0400), and make a new key."
                )
            return file.read(1024)
    except OSError as error:
        raise ConfigError(f"the key file {path} cannot be read: {error.strerror}.") from error


def _parse(name: str, data: bytes) -> bytes:
    if len(data) == KEY_BYTES:
        if not set(data) <= set(string.printable.encode()):
            return data
        raise ConfigError(f"{name} holds {KEY_BYTES} letters, which are no random key; {MAKE_ONE}.")
    text = data.strip()
    if _HEXADECIMAL.fullmatch(text):
        return bytes.fromhex(text.decode())
    if _BASE64.fullmatch(text):
        try:
            return base64.urlsafe_b64decode(text.replace(b"+", b"-").replace(b"/", b"_").ljust(44, b"="))
        except binascii.Error:
            pass
    raise ConfigError(f"{name} holds no key ({len(data)} bytes): give {FORMS}; {MAKE_ONE}.")


def _require_cryptography() -> None:
    try:
        from cryptography.hazmat.primitives.ciphers.aead import AESGCM
    except ImportError:
        found = False
    else:
        found = hasattr(AESGCM, "decrypt_into")
    if not found:
        raise ConfigError(
            "encryption needs the package cryptography, 47 or newer: `pip install 'cryptography>=47'`."
        )
