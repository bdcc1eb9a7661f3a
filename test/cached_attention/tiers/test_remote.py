"""The remote tier against a real Mooncake master, over TCP on this machine."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from threading import Barrier, Event

import numpy as np
import pytest

from benchmark.mooncake import Master
from cached_attention.checksum import page_checksum
from cached_attention.encryption import EncryptionKey
from cached_attention.fingerprint import Fingerprint
from cached_attention.layout import PageLayout
from cached_attention.tiers.host import HostTier
from cached_attention.tiers.page_io import PageRead, PageWrite, ReadOutcome
from cached_attention.tiers.remote import RemoteStats, RemoteTier
from cached_attention.tiers.remote_address import parse_remote
from cached_attention.tiers.remote_client import Extent, RemoteClient, RemoteError
from cached_attention.tiers.remote_records import STAGING_BYTES, SealedObjects, Staging

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

    def __init__(
        self, master: Master, segment: str = str(SEGMENT), encryption: EncryptionKey | None = None
    ) -> None:
        address = parse_remote("--remote", master.url(segment))
        self.host = HostTier(LAYOUT, PAGES * LAYOUT.stride)
        self.tier = RemoteTier(
            address, address.segment, fingerprint("w"), encryption=encryption, probe_seconds=(0.1, 0.2)
        )
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
        return sum(self.tier.exist([key(number) for number in numbers]).result(PATIENCE))

    def name(self, number: int) -> str:
        return self.tier._objects.name(key(number))

    def raw(self, number: int) -> bytes:
        """The object as it lies in the store."""
        return bytes(self.tier._client._call.get(self.name(number)))

    def replace(self, number: int, data: bytes) -> None:
        self.tier._client.remove([self.name(number)])
        assert self.tier._client._call.put(self.name(number), data) == 0


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


def test_ranks_put_the_same_pages_at_once(pair: tuple[Member, Member]) -> None:
    a, b = pair
    numbers = range(100, 100 + 8 * PAGES)
    with ThreadPoolExecutor(2) as pool:
        for first in numbers[::PAGES]:
            some = range(first, first + PAGES)
            assert list(pool.map(lambda member, some=some: member.put(some), pair)) == [[True] * PAGES] * 2
    assert b.has(numbers) == len(numbers)
    assert a.get([101, 163]) == [READ, READ]
    assert b.get([101, 163]) == [READ, READ]


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


def flipped(data: bytes, place: int) -> bytes:
    return data[:place] + bytes([data[place] ^ 1]) + data[place:][1:]


@pytest.mark.parametrize("damage", ["bytes", "checksum", "foreign", "short", "long"])
def test_a_bad_object_is_a_counted_miss_and_makes_room_for_a_good_one(
    pair: tuple[Member, Member], damage: str
) -> None:
    a, b = pair
    spoil(a, damage)
    a_bad_object_is_a_counted_miss(a, b)


def spoil(member: Member, damage: str) -> None:
    """Put pages 0 and 1, and something else in the place of 0."""
    member.put([0, 1])
    good = member.raw(0)
    member.replace(
        0,
        {
            "bytes": flipped(good, 77),
            "checksum": flipped(good, LAYOUT.page_bytes + 20 if len(good) > LAYOUT.page_bytes + 20 else -8),
            "tag": flipped(good, LAYOUT.page_bytes),
            "nonce": flipped(good, len(good) - 17),
            "epoch": flipped(good, len(good) - 1),
            "foreign": member.raw(1),
            "short": good[:100],
            "long": good + b"x",
        }[damage],
    )


def a_bad_object_is_a_counted_miss(a: Member, b: Member) -> None:
    assert b.get([0, 1]) == [LOST, READ]
    assert (b.tier.stats.damaged, b.tier.stats.missed) == (1, 0)
    until(lambda: b.has([0]) == 0, "the bad object stays")
    a.put([0])
    assert b.get([0]) == [READ]


KEY, OTHER_KEY = EncryptionKey(bytes(range(32))), EncryptionKey(bytes(range(1, 33)))


@pytest.fixture(scope="module")
def sealed_members(master: Master) -> Iterator[tuple[Member, Member, Member]]:
    """Two with one key, and one with another."""
    a, b, stranger = Member(master, "16MiB", KEY), Member(master, "0", KEY), Member(master, "0", OTHER_KEY)
    with joined(a, b, stranger):
        yield a, b, stranger


@pytest.fixture
def sealed(sealed_members: tuple[Member, Member, Member]) -> tuple[Member, Member, Member]:
    """With nothing in the store."""
    for member in sealed_members:
        member.tier.stats = RemoteStats()
    sealed_members[0].tier._client._call.remove_all(True)
    return sealed_members


def test_sealed_pages_move_between_servers_with_the_key(sealed: tuple[Member, Member, Member]) -> None:
    a, b, stranger = sealed
    assert a.put(range(6)) == [True] * 6
    assert b.has(range(8)) == 6
    assert b.get([3, 0, 7, 5]) == [READ, READ, LOST, READ]
    assert stranger.has([0]) == 0
    assert stranger.get([0]) == [LOST]
    assert (stranger.tier.stats.missed, stranger.tier.stats.damaged) == (1, 0)
    a.tier.remove([key(0)])
    until(lambda: b.has([0]) == 0, "it was not removed")


def test_the_store_learns_neither_pages_nor_keys(sealed: tuple[Member, Member, Member]) -> None:
    a, _, stranger = sealed
    a.put([0, 1])
    raw = a.raw(0)
    assert len(raw) == SealedObjects.bytes_for(LAYOUT.page_bytes)
    for start in range(0, LAYOUT.page_bytes - 16, 16):
        assert record(0)[start : start + 16] not in raw
    assert page_checksum(key(0), record(0)).to_bytes(8, "little") not in raw
    assert key(0).hex() not in a.name(0)
    assert a.name(0) != stranger.name(0)
    a.tier._client.remove([a.name(0)])
    a.put([0])
    assert a.raw(0)[:64] != raw[:64], "a nonce came back"


@pytest.mark.parametrize("damage", ["bytes", "checksum", "tag", "nonce", "epoch", "foreign", "short", "long"])
def test_a_bad_sealed_object_is_a_counted_miss(sealed: tuple[Member, Member, Member], damage: str) -> None:
    a, b, _ = sealed
    spoil(a, damage)
    a_bad_object_is_a_counted_miss(a, b)


def test_an_object_sealed_with_another_key_is_a_counted_miss(sealed: tuple[Member, Member, Member]) -> None:
    a, b, stranger = sealed
    a.put([0, 1])
    stranger.put([0])
    a.replace(0, stranger.raw(0))
    a_bad_object_is_a_counted_miss(a, b)


def test_sealed_pages_of_other_weights_are_others(sealed: tuple[Member, Member, Member]) -> None:
    a, *_ = sealed
    a.put([0, 1])
    old = a.raw(0)
    a.tier.serve(fingerprint("new"))
    assert a.has([0]) == 0
    a.tier._client._call.put(a.name(0), old)
    assert a.get([0]) == [LOST]
    assert a.tier.stats.damaged == 1
    a.tier.serve(fingerprint("w"))
    assert a.get([0]) == [READ]


def test_a_page_that_changed_in_memory_before_it_was_put_is_damaged(
    sealed: tuple[Member, Member, Member],
) -> None:
    a, b, _ = sealed
    buffer = a.host.slot_bytes(0)
    buffer[: LAYOUT.page_bytes] = flipped(record(0), 5)
    checksum = page_checksum(key(0), record(0))
    assert a.tier.write([PageWrite(key(0), None, 0, checksum, 0.0, 1, buffer)]).result(PATIENCE) == [0]
    assert b.get([0]) == [LOST]
    assert b.tier.stats.damaged == 1


def test_staging_is_bounded_and_each_thread_has_its_own() -> None:
    assert Staging(2, STAGING_BYTES).objects == 1
    staging = Staging(2, 1000)
    assert staging.objects == 16
    with ThreadPoolExecutor(2) as pool:
        barrier = Barrier(2)
        parts = list(pool.map(lambda _: (barrier.wait(PATIENCE), staging.buffers())[1], range(2)))
    places = {staging.regions[0][0] + 1000 * place for place in range(32)}
    assert {np.frombuffer(one, np.uint8).ctypes.data for part in parts for one in part} == places


def test_what_is_removed_is_gone_for_all(pair: tuple[Member, Member]) -> None:
    a, b = pair
    a.put([0, 1])
    assert b.get([0]) == [READ]
    a.tier.remove([key(0)])
    until(lambda: b.has([0]) == 0, "it was not removed")
    assert b.get([0, 1]) == [LOST, READ]


def test_an_operator_can_remove_the_pages_of_one_fingerprint(
    pair: tuple[Member, Member], caplog: pytest.LogCaptureFixture
) -> None:
    """As docs/remote.md says: by the beginning of their names, which the log of a server has."""
    a, b = pair
    caplog.set_level("INFO")
    b.tier.serve(fingerprint("new"))
    prefix = caplog.messages[-1].split(" are named ")[1].removesuffix("...")
    a.put([0, 1, 2])
    b.put([0, 1])
    assert a.tier._client._call.remove_by_regex(f"^{prefix}", True) == 2
    assert (a.has(range(3)), b.has(range(2))) == (3, 0)
    b.tier.serve(fingerprint("w"))


def test_a_full_store_refuses_or_forgets(pair: tuple[Member, Member]) -> None:
    a, _ = pair
    addresses = a.tier._memory.addresses(0)
    large = (a.host.arena.numel(), 8)
    for first in range(0, 2 * SEGMENT // sum(large), 100):
        a.tier._client.put([Extent(f"{first}-{i}", addresses, large) for i in range(100)])
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


@pytest.mark.parametrize("error", [RuntimeError("of the binding"), OSError("no route")])
def test_an_unexpected_error_of_the_client_is_an_outage(
    pair: tuple[Member, Member], monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    a, _ = pair
    client, ping = a.tier._client, a.tier._client.ping

    def fail() -> str:
        raise error

    monkeypatch.setattr(client, "ping", fail)
    a.tier._health.failed(RemoteError("it does not answer"))
    until(lambda: a.tier._health.seconds_to_probe() is not None, "no outage")
    time.sleep(0.5)
    assert not a.tier.healthy
    monkeypatch.setattr(client, "ping", ping)
    until(lambda: a.tier.healthy, "it never comes back")


def test_a_tier_that_is_closed_while_it_connects_does_not_join(
    master: Master, monkeypatch: pytest.MonkeyPatch
) -> None:
    connecting, closed = Event(), Event()
    connect = RemoteClient.connect

    def late(client: RemoteClient, memory: Sequence[tuple[int, int]]) -> None:
        connecting.set()
        assert closed.wait(PATIENCE)
        connect(client, memory)

    monkeypatch.setattr(RemoteClient, "connect", late)
    member = Member(master)
    assert connecting.wait(PATIENCE)
    assert not member.tier.close(0.1), "it still connects"
    closed.set()
    member.tier._keeper.join(PATIENCE)
    assert not member.tier._client.connected
