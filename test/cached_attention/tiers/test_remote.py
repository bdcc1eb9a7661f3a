"""The remote tier against a real Mooncake master, over TCP on this machine."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import pytest

from benchmark.mooncake import Master
from cached_attention.checksum import page_checksum
from cached_attention.fingerprint import Fingerprint
from cached_attention.layout import PageLayout
from cached_attention.tiers.disk_pages import PageRead, PageWrite, ReadOutcome
from cached_attention.tiers.host import HostTier
from cached_attention.tiers.remote import RemoteStats, RemoteTier
from cached_attention.tiers.remote_address import parse_remote
from cached_attention.tiers.remote_client import Extent

LAYOUT = PageLayout(64, ((5000, 5000),))
PAGES = 8
SEGMENT = 64 << 20
PATIENCE = 60.0


def key(number: int) -> bytes:
    return hashlib.sha256(b"%d" % number).digest()


def record(number: int) -> bytes:
    return hashlib.shake_256(b"%d" % number).digest(LAYOUT.page_bytes)


def until(reached: Callable[[], bool], what: str) -> None:
    deadline = time.monotonic() + PATIENCE
    while not reached():
        assert time.monotonic() < deadline, what
        time.sleep(0.01)


class Member:
    """One server's part of a store: an arena and a tier."""

    def __init__(self, master: Master, segment: str = str(SEGMENT)) -> None:
        address = parse_remote("--remote", master.url(segment))
        self.host = HostTier(LAYOUT, PAGES * LAYOUT.stride)
        self.tier = RemoteTier(address, address.segment, fingerprint("w"), probe_seconds=(0.1, 0.2))
        self.tier.open(self.host)

    def join(self) -> None:
        until(lambda: self.tier.healthy, "the store is not reached")

    def put(self, numbers: Sequence[int]) -> list[bool]:
        writes = []
        for slot, number in enumerate(numbers):
            buffer = self.host.slot_bytes(slot)
            buffer[: LAYOUT.page_bytes] = record(number)
            checksum = page_checksum(key(number), record(number))
            writes.append(PageWrite(key(number), None, 0, checksum, 0.0, 1, buffer))
        return [place is not None for place in self.tier.write(writes).result(PATIENCE)]

    def get(self, numbers: Sequence[int]) -> list[ReadOutcome]:
        self.host.arena.zero_()
        reads = [PageRead(key(number), -1, 0, self.host.slot_bytes(slot)) for slot, number in enumerate(numbers)]
        outcomes = self.tier.read(reads).result(PATIENCE)
        for slot, (number, outcome) in enumerate(zip(numbers, outcomes, strict=True)):
            if outcome is ReadOutcome.READ:
                assert bytes(self.host.record(slot)) == record(number)
                assert self.tier.checksum(self.host.slot_bytes(slot)) == page_checksum(
                    key(number), record(number)
                )
        return outcomes

    def has(self, numbers: Sequence[int]) -> int:
        (leading,) = self.tier.exist([key(number) for number in numbers]).result(PATIENCE)
        return leading


def fingerprint(weights: str) -> Fingerprint:
    return Fingerprint("m", weights, "bfloat16", 64, LAYOUT.component_bytes, {"tp_rank": 0, "tp_size": 1}, {})


@contextmanager
def joined(*members: Member) -> Iterator[None]:
    try:
        for member in members:
            member.join()
        yield
    finally:
        with ThreadPoolExecutor(len(members)) as pool:  # Mooncake takes its time to leave.
            list(pool.map(lambda member: member.tier.close(), members))


@pytest.fixture(scope="module")
def members(master: Master) -> Iterator[tuple[Member, Member]]:
    """Both lend memory, so pages of either lie with both."""
    a, b = Member(master), Member(master)
    with joined(a, b):
        yield a, b


@pytest.fixture
def pair(members: tuple[Member, Member]) -> tuple[Member, Member]:
    """With nothing in the store."""
    for member in members:
        member.tier.stats = RemoteStats()
    members[0].tier._client._call.remove_all(True)
    return members


READ, LOST, UNAVAILABLE = ReadOutcome.READ, ReadOutcome.LOST, ReadOutcome.UNAVAILABLE


def test_pages_move_from_one_server_to_another(pair: tuple[Member, Member]) -> None:
    a, b = pair
    assert b.has([0, 1]) == 0
    assert a.put(range(6)) == [True] * 6
    assert b.has(range(8)) == 6
    assert b.get([3, 0, 7, 5]) == [READ, READ, LOST, READ]
    assert (b.tier.stats.got, b.tier.stats.missed, b.tier.stats.damaged) == (3, 1, 0)
    assert a.put([2]) == [True], "what is there already counts as put"


def test_servers_of_other_weights_never_meet(pair: tuple[Member, Member]) -> None:
    a, b = pair
    b.tier.serve(fingerprint("new"))
    a.put([0])
    assert b.has([0]) == 0
    b.tier.pause()
    assert not b.tier.healthy
    assert b.get([0]) == [UNAVAILABLE]
    b.tier.serve(fingerprint("w"))
    assert b.get([0]) == [READ]


@pytest.mark.parametrize("damage", ["bytes", "foreign", "short", "long"])
def test_a_bad_object_is_a_counted_miss_and_makes_room_for_a_good_one(
    pair: tuple[Member, Member], damage: str
) -> None:
    a, b = pair
    a.put([0, 1])
    name, other = a.tier._object(key(0)), a.tier._extent(key(1), 1)
    a.tier._client.remove([name])
    sizes = {"short": (100, 8), "long": (LAYOUT.page_bytes + 1, 8)}.get(damage, other.sizes)
    if damage == "bytes":
        a.host.slot_bytes(0)[77] ^= 1
        other = a.tier._extent(key(0), 0)
    assert a.tier._client.put([Extent(name, other.addresses, sizes)]) == [True]
    assert b.get([0, 1]) == [LOST, READ]
    assert (b.tier.stats.damaged, b.tier.stats.missed) == (1, 0)
    until(lambda: b.has([0]) == 0, "the bad object stays")
    a.put([0])
    assert b.get([0]) == [READ]


def test_what_is_removed_is_gone_for_all(pair: tuple[Member, Member]) -> None:
    a, b = pair
    a.put([0, 1])
    assert b.get([0]) == [READ]
    a.tier.remove([key(0)])
    until(lambda: b.has([0]) == 0, "it was not removed")
    assert b.get([0, 1]) == [LOST, READ]


def test_a_full_store_refuses_or_forgets(pair: tuple[Member, Member]) -> None:
    a, _ = pair
    page = a.tier._extent(key(0), 0)
    large = (a.host.arena.numel(), 8)
    for first in range(0, 2 * SEGMENT // sum(large), 100):
        a.tier._client.put([Extent(f"{first}-{i}", page.addresses, large) for i in range(100)])
    until(lambda: a.put([0]) == [True], "the store stays full")
    assert a.get([0]) == [READ]
    assert a.tier.healthy


def test_a_lost_master_means_misses_until_it_is_back(
    master: Master, pair: tuple[Member, Member], caplog: pytest.LogCaptureFixture
) -> None:
    a, b = pair
    a.put([0])
    outages = b.tier.outages
    master.kill()
    assert b.get([0]) == [UNAVAILABLE]
    assert not b.tier.healthy
    assert b.tier.outages == outages + 1
    begun = time.monotonic()
    assert b.get([0] * PAGES) == [UNAVAILABLE] * PAGES
    assert b.put([1]) == [False]
    assert b.has([0]) == 0
    assert time.monotonic() - begun < PATIENCE, "what is out of service is not asked"
    assert len([line for line in caplog.messages if "mooncake://" in line]) == 2, "one warning, one state"
    master.start()
    until(lambda: b.tier.healthy, "it does not come back")
    until(lambda: a.put([2]) == [True], "nothing can be put")
    until(lambda: b.get([2]) == [READ], "what others put is not found")


def test_a_lost_peer_costs_its_pages(master: Master) -> None:
    with Master() as own, joined(b := Member(own, segment="0")):
        lender = Member(own)
        lender.join()
        assert b.put([0]) == [True]
        assert b.get([0]) == [READ]
        lender.tier.close()
        assert b.get([0]) == [LOST]
        assert b.tier.healthy


def test_a_store_may_start_after_its_servers(master: Master) -> None:
    master.kill()
    a = Member(master)
    assert a.put([0]) == [False]
    time.sleep(0.2)
    master.start()
    with joined(a):
        assert a.put([0]) == [True]
