import random

from cached_attention.checksum import page_checksum


def test_any_change_of_key_or_bytes_changes_it():
    chance = random.Random(3)
    key, record = chance.randbytes(32), bytearray(chance.randbytes(5000))
    whole = page_checksum(key, record)
    seen = {whole}
    for _ in range(300):
        place, bit = chance.randrange(len(record)), 1 << chance.randrange(8)
        record[place] ^= bit
        seen.add(page_checksum(key, record))
        record[place] ^= bit
    for place in range(32):
        seen.add(page_checksum(key[:place] + bytes([key[place] ^ 1]) + key[place + 1 :], record))
    assert len(seen) > 300
    assert page_checksum(key, record) == whole
    assert page_checksum(key, record[:-1]) != whole


def test_it_is_the_same_in_every_process_and_for_every_buffer():
    record = bytes(range(256)) * 16
    checksums = {page_checksum(b"k" * 32, kind(record)) for kind in (bytes, bytearray, memoryview)}
    assert checksums == {0xEAAE_67D6_16C9_9647}
