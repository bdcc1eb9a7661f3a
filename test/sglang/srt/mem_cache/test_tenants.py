"""Tenants that send the same prompt share no record, down to the bytes on disk and in the remote store."""

from __future__ import annotations

import mmap
import random
import sqlite3
import time
from array import array
from contextlib import closing
from itertools import combinations
from pathlib import Path

import pytest
from sglang.srt.mem_cache.cached_attention.tree_link import RequestChain
from sglang.srt.mem_cache.radix_cache import RadixKey

from benchmark.mooncake import Master
from cached_attention.chain import Chain
from cached_attention.checksum import page_checksum
from cached_attention.encryption import EncryptionKey
from cached_attention.fingerprint import Fingerprint
from cached_attention.layout import PageLayout
from cached_attention.tiers.disk import DiskTier
from cached_attention.tiers.host import HostTier
from cached_attention.tiers.page_io import PageRead, PageWrite, ReadOutcome
from cached_attention.tiers.remote import RemoteTier
from cached_attention.tiers.remote_address import parse_remote

PAGE, PAGES, PAGE_BYTES = 16, 8, 4096
TENANTS = [(None, None), (None, "alice"), (None, "bob"), ("alice", None), ("bob", "alice")]
"""`extra_key` and `cache_salt`."""
KEYS = pytest.mark.parametrize("key", [None, EncryptionKey(bytes(range(32)))], ids=["plain", "encrypted"])
PATIENCE = 60.0


def chain(extra_key: str | None, cache_salt: str | None) -> list[bytes]:
    """Page keys of one prompt, as SGLang and we hash it."""
    request = RequestChain([], Chain())
    request.extend(RadixKey(array("q", range(PAGE * PAGES)), extra_key, cache_salt=cache_salt), PAGE)
    return request.chain.keys


def save(tier: DiskTier, keys: list[bytes], record: bytes) -> list[int | None]:
    pages, parent = [], None
    for place, key in enumerate(keys):
        buffer = memoryview(mmap.mmap(-1, PAGE_BYTES))
        buffer[:] = record
        pages.append(PageWrite(key, parent, place * PAGE, page_checksum(key, record), 1e9, 1, buffer))
        parent = key
    return tier.write(pages).result(30)


@KEYS
def test_the_same_prompt_of_two_tenants_shares_nothing_on_disk(tmp_path: Path, key: EncryptionKey | None) -> None:
    fingerprint = Fingerprint("m", "w", "bfloat16", PAGE, ((PAGE_BYTES // 2,) * 2,), {}, {})
    tier = DiskTier(tmp_path / "kv", fingerprint, 8 << 20, encryption=key)
    record = random.Random(0).randbytes(PAGE_BYTES)
    chains = {tenant: chain(*tenant) for tenant in TENANTS}
    slots = {tenant: save(tier, keys, record) for tenant, keys in chains.items()}
    for one, other in combinations(TENANTS, 2):
        assert not set(chains[one]) & set(chains[other])
        assert not set(slots[one]) & set(slots[other])
        buffers = [memoryview(mmap.mmap(-1, PAGE_BYTES)) for _ in range(PAGES)]
        foreign = [
            PageRead(page, slot, page_checksum(page, record), buffer)
            for page, slot, buffer in zip(chains[one], slots[other], buffers, strict=True)
            if slot is not None
        ]
        # In the clear the bytes are equal, and page and key are tied by the checksum in the row alone.
        expected = ReadOutcome.LOST if key else ReadOutcome.READ
        assert set(tier.read(foreign).result(30)) == {expected}
    path = tier.path
    tier.close()
    with closing(sqlite3.connect(path / "index.sqlite3")) as index:
        columns = "key" if key is None else "sealed"
        rows = index.execute(f"SELECT DISTINCT {columns} FROM pages").fetchall()
    assert len(rows) == PAGES * len(TENANTS)
    data = (path / "pages-000000.bin").read_bytes()
    records = {data[at : at + PAGE_BYTES] for at in range(0, len(data), tier.stride)} - {bytes(PAGE_BYTES)}
    assert len(records) == (1 if key is None else PAGES * len(TENANTS))


@KEYS
def test_the_same_prompt_of_two_tenants_shares_nothing_in_the_remote_store(
    master: Master, key: EncryptionKey | None
) -> None:
    layout = PageLayout(PAGE, ((PAGE_BYTES // 2,) * 2,))
    host = HostTier(layout, PAGES * layout.stride)
    address = parse_remote("--remote", master.url("16MiB"))
    tier = RemoteTier(
        address,
        address.segment,
        Fingerprint("m", str(key), "bfloat16", PAGE, layout.component_bytes, {}, {}),
        encryption=key,
        probe_seconds=(0.1, 0.2),
    )
    tier.open(host)
    deadline = time.monotonic() + PATIENCE
    while not tier.healthy:
        assert time.monotonic() < deadline, "the store is not reached"
        time.sleep(0.01)
    assert tier._objects is not None
    client, name = tier._client._call, tier._objects.name
    record = random.Random(0).randbytes(PAGE_BYTES)
    chains = {tenant: chain(*tenant) for tenant in TENANTS}
    objects = {}
    for keys in chains.values():
        pages = []
        for slot, page in enumerate(keys):
            host.slot_bytes(slot)[:PAGE_BYTES] = record
            pages.append(PageWrite(page, None, 0, page_checksum(page, record), 1e9, 1, host.slot_bytes(slot)))
        assert None not in tier.write(pages).result(PATIENCE)
        objects |= {name(page): bytes(client.get(name(page))) for page in keys}
    assert len(objects) == PAGES * len(TENANTS)
    assert len(set(objects.values())) == len(objects), "the checksum is over the page's key as well"
    assert len({data[:PAGE_BYTES] for data in objects.values()}) == (1 if key is None else len(objects))
    for one, other in combinations(TENANTS, 2):
        # What another tenant has, under the name of one's own.
        own, foreign = name(chains[one][0]), name(chains[other][0])
        client.remove(own, True)
        assert client.put(own, objects[foreign]) == 0
        read = PageRead(chains[one][0], -1, 0, host.slot_bytes(0))
        assert tier.read([read]).result(PATIENCE) == [ReadOutcome.LOST]
    tier.close()
