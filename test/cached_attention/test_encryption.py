"""Where the key comes from, and what is said where it does not."""

import base64
import os
import secrets

import pytest

from cached_attention.config import ConfigError
from cached_attention.encryption import IN_ENVIRONMENT, KEY_VARIABLE, EncryptionKey, key_place, read_key

SECRET = bytes(range(200, 232))
FORMS = {
    "raw": SECRET,
    "hexadecimal": SECRET.hex().encode(),
    "upper case, with a newline": SECRET.hex().upper().encode() + b"\n",
    "base64": base64.b64encode(SECRET) + b"\n",
    "base64 for URLs, without padding": base64.urlsafe_b64encode(SECRET).rstrip(b"="),
}


@pytest.fixture
def key_file(tmp_path):
    def write(data, mode=0o600):
        path = tmp_path / "key"
        path.write_bytes(data)
        path.chmod(mode)
        return str(path)

    return write


@pytest.mark.parametrize("form", FORMS)
def test_forms_of_one_key(key_file, form):
    key = read_key(key_file(FORMS[form]))
    assert key.id == EncryptionKey(SECRET).id
    assert key.derive(b"x") == EncryptionKey(SECRET).derive(b"x")
    if form != "raw":
        assert read_key(IN_ENVIRONMENT, {KEY_VARIABLE: FORMS[form].decode()}).id == key.id


@pytest.mark.parametrize(
    "data",
    [b"", b"hunter2", SECRET[:-1], SECRET + b"x", SECRET.hex().encode()[:-1], b"=" * 44, b"p" * 32, b"a" * 42],
    ids=lambda data: str(len(data)),
)
def test_what_is_no_key(key_file, data):
    with pytest.raises(ConfigError, match="openssl rand") as refusal:
        read_key(key_file(data))
    assert len(data) < 5 or data.decode(errors="replace") not in str(refusal.value)


@pytest.mark.parametrize("mode", [0o604, 0o640 | 0o020, 0o602, 0o644, 0o666])
def test_a_file_that_others_can_use(key_file, mode):
    with pytest.raises(ConfigError, match=f"mode {mode:04o}.*chmod 600"):
        read_key(key_file(SECRET, mode))


def test_a_group_may_read_it_as_kubernetes_has_it(key_file):
    assert read_key(key_file(SECRET, 0o440)).id == EncryptionKey(SECRET).id


def test_a_file_that_is_none(tmp_path):
    with pytest.raises(ConfigError, match="cannot be read: No such file"):
        read_key(str(tmp_path / "absent"))
    with pytest.raises(ConfigError, match="cannot be read: Is a directory"):
        read_key(str(tmp_path))
    os.mkfifo(tmp_path / "pipe", 0o600)
    writer = os.open(tmp_path / "pipe", os.O_RDWR)
    with pytest.raises(ConfigError, match="not a regular file"):
        read_key(str(tmp_path / "pipe"))
    os.close(writer)


def test_one_place(tmp_path):
    assert key_place("--flag", None, {}) is None
    assert key_place("--flag", None, {KEY_VARIABLE: "x"}) == IN_ENVIRONMENT
    assert key_place("--flag", str(tmp_path / "key"), {}) == str(tmp_path / "key")
    with pytest.raises(ConfigError, match=r"--flag and \$CACHED_ATTENTION_ENCRYPTION_KEY are both given"):
        key_place("--flag", "key", {KEY_VARIABLE: "x"})


def test_a_process_that_did_not_inherit_it():
    with pytest.raises(ConfigError, match="not set in this process"):
        read_key(IN_ENVIRONMENT, {})


def test_keys_and_purposes_differ_and_nothing_shows_the_secret():
    first, second = EncryptionKey(secrets.token_bytes(32)), EncryptionKey(secrets.token_bytes(32))
    assert len({first.id, second.id, first.derive(b"a").hex(), first.derive(b"b").hex()}) == 4
    key = EncryptionKey(SECRET)
    assert SECRET.hex()[:16] not in repr(key) + key.id
    with pytest.raises(ConfigError, match="32 bytes, not 31"):
        EncryptionKey(SECRET[:-1])


def test_an_old_cryptography_is_named(monkeypatch):
    monkeypatch.setattr("cryptography.hazmat.primitives.ciphers.aead.AESGCM", object)
    with pytest.raises(ConfigError, match="47 or newer: `pip install 'cryptography>=47'`"):
        EncryptionKey(SECRET)
