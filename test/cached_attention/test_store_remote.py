"""Two stores that share a real Mooncake store: what one computed, the other loads."""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from hashlib import sha256
from pathlib import Path
from threading import Event

import pytest
import torch

from benchmark.mooncake import Master
from cached_attention import store
from cached_attention.chain import Chain, PageRun
from cached_attention.encryption import EncryptionKey
from cached_attention.fingerprint import Fingerprint
from cached_attention.layout import DevicePool
from cached_attention.store import CachedAttentionStore
from cached_attention.tiers.disk import DiskTier
from cached_attention.tiers.remote import RemoteTier
from cached_attention.tiers.remote_address import parse_remote

PAGE = 2
HOST_PAGES = 6
DEVICE_PAGES = 12
PATIENCE = 60.0


def keys_of(prompt: str) -> list[bytes]:
    return [sha256(prompt[: i + 1].encode()).digest() for i in range(len(prompt))]


def content(key: bytes) -> torch.Tensor:
    return torch.rand(PAGE, 1, 4, generator=torch.Generator().manual_seed(int.from_bytes(key[:4])))


def until(reached: Callable[[], bool], what: str) -> None:
    deadline = time.monotonic() + PATIENCE
    while not reached():
        assert time.monotonic() < deadline, what
        time.sleep(0.005)


class Replica:
    """A server's store over a device pool whose pages have a content by their key."""

    def __init__(
        self, master: Master, weights: str, disk: Path | None = None, encryption: EncryptionKey | None = None
    ) -> None:
        self.buffers = [[torch.zeros(DEVICE_PAGES * PAGE, 1, 4) for _ in "kv"] for _ in range(2)]
        pool = DevicePool(self.buffers, PAGE)
        component_bytes = pool.layout.component_bytes
        fingerprint = Fingerprint("m", weights, "float32", PAGE, component_bytes, {"tp_rank": 0}, {})
        address = parse_remote("--remote", master.url("16MiB"))
        remote = RemoteTier(
            address, address.segment, fingerprint, encryption=encryption, probe_seconds=(0.1, 0.2)
        )
        tier = None if disk is None else DiskTier(disk, fingerprint, 4 << 20)
        self.store = CachedAttentionStore(pool, HOST_PAGES * pool.layout.stride, tier, remote)
        self.batch = 0
        for _ in range(20):
            self.store.prefill_took(PAGE, 60.0)  # So that a fetch is always worth waiting for.

    def join(self) -> None:
        until(lambda: bool(self.counters["remote_healthy"]), "the store is not reached")

    @property
    def counters(self) -> dict[str, int]:
        return self.store.counters()

    def save(self, prompt: str) -> bool:
        keys = keys_of(prompt)
        for page, key in enumerate(keys):
            for buffer in (buffer for layer in self.buffers for buffer in layer):
                buffer[page * PAGE : (page + 1) * PAGE] = content(key)
        self.store.save(PageRun(None, 0, keys, torch.arange(len(keys) * PAGE)))
        self.store.flush(PATIENCE)
        assert self.store.poll() == 1
        return self.store.pop_save()

    def fetch(self, prompt: str) -> int:
        chain = Chain(keys_of(prompt))
        self.store.arrive(prompt, chain)
        until(lambda: self.store.poll() or self.store.is_ready(prompt), "a fetch hangs")
        return self.store.loadable_pages(chain)

    def load(self, prompt: str) -> int:
        """Pages that could be loaded; every byte is checked."""
        self.fetch(prompt)
        pages = self.store.reserve(prompt, Chain(keys_of(prompt)))
        if not pages:
            self.store.leave(prompt)
            return 0
        for buffer in (buffer for layer in self.buffers for buffer in layer):
            buffer.zero_()
        self.batch += 1
        assert self.store.queue_load(prompt, keys_of(prompt)[:pages], torch.arange(pages * PAGE))
        self.store.start_load(self.batch)
        assert self.store.finish_load(self.batch)
        self.store.end_pass()
        for page, key in enumerate(keys_of(prompt)[:pages]):
            for buffer in (buffer for layer in self.buffers for buffer in layer):
                assert torch.equal(buffer[page * PAGE : (page + 1) * PAGE], content(key))
        self.store.check_invariants()
        return pages


@pytest.fixture
def replicas(master: Master, request: pytest.FixtureRequest) -> Iterator[Callable[..., Replica]]:
    """Makes replicas of a model of this test's own."""
    made: list[Replica] = []

    def replica(disk: Path | None = None, encryption: EncryptionKey | None = None) -> Replica:
        made.append(Replica(master, request.node.name, disk, encryption))
        made[-1].join()
        return made[-1]

    yield replica
    for one in made:
        one.store.check_invariants()
    with ThreadPoolExecutor(len(made)) as pool:  # Mooncake takes its time to leave.
        list(pool.map(lambda one: one.store.close(), made))


def test_a_conversation_moves_to_another_server_and_back(replicas: Callable[..., Replica]) -> None:
    a, b = replicas(), replicas()
    assert a.save("abc")
    assert b.load("abcde") == 3
    assert b.counters["fetched"] == 3
    assert b.save("abcde")
    assert a.load("abcdef") == 5
    assert a.load("xyz") == 0


def test_an_encrypted_conversation_moves_to_a_server_with_the_key(replicas: Callable[..., Replica]) -> None:
    key, other = EncryptionKey(bytes(range(32))), EncryptionKey(bytes(range(1, 33)))
    a, b, stranger = replicas(encryption=key), replicas(encryption=key), replicas(encryption=other)
    assert a.save("abc")
    assert b.load("abcde") == 3
    assert stranger.load("abcde") == 0
    assert replicas().load("abcde") == 0
    assert b.save("abcde")
    assert a.load("abcdef") == 5


def test_what_left_host_memory_comes_back(replicas: Callable[..., Replica]) -> None:
    a = replicas()
    a.save("abc")
    a.save("uvwxyz")
    assert a.load("abc") == 3
    assert a.counters["remote_put"] == 9
    assert a.counters["remote_lookups"] == 0, "what was put is known"


@pytest.mark.parametrize("call", ["reset", "detach_disk"])
def test_a_put_that_never_ends_holds_nothing_up(
    replicas: Callable[..., Replica], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str
) -> None:
    a, gate = replicas(tmp_path), Event()
    with monkeypatch.context() as patched:
        patched.setattr(store, "PATIENCE", 0.2)
        patched.setattr(a.store.remote._client, "put", lambda extents: [gate.wait(PATIENCE)] * len(extents))
        a.store.save(PageRun(None, 0, keys_of("ab"), torch.arange(2 * PAGE)))
        until(lambda: a.store.poll() and a.store.pop_save(), "nothing is saved")
        until(lambda: a.store.poll() or a.store._migration.to_remote.rows_in_flight == 2, "nothing is put")
        getattr(a.store, call)()
        assert a.store.remote is None
        a.store.check_invariants()
        assert a.save("uvwxyz"), "all of host memory can be used"
        gate.set()
    if call == "reset":
        assert a.counters["disk_pages_used"] == 6, "the disk is used as before"
        assert a.save("abcdef")
        assert a.load("uvwx") == 4


def test_a_disk_that_never_answers_leaves_the_remote_store(
    replicas: Callable[..., Replica], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    a, b = replicas(tmp_path), replicas()
    a.save("ab")
    assert a.store.flush(PATIENCE) == 0
    a.save("uvwxyz")
    monkeypatch.setattr(store, "PATIENCE", 0.2)
    never: Future[object] = Future()
    never.set_running_or_notify_cancel()
    monkeypatch.setattr(a.store.disk, "read", lambda pages: never)
    a.store.arrive("r", Chain(keys_of("ab")))
    until(lambda: a.store.poll() or a.store._migration.fetch.is_reading, "nothing is read")
    retired = a.store._migration.fetch.slots_in_flight
    a.store.reset()
    assert (a.store.disk, a.store.remote is None) == (None, False)
    assert a.store.host.retired == set(retired) != set()
    a.store.check_invariants()
    assert a.load("ab") == 2, "the remote store has them"
    assert a.save("mn")
    assert b.load("mn") == 2


def test_pages_from_the_remote_store_go_to_disk(replicas: Callable[..., Replica], tmp_path: Path) -> None:
    a, b = replicas(), replicas(tmp_path)
    a.save("abcd")
    assert b.load("abcd") == 4
    assert b.store.flush(PATIENCE) == 0
    assert b.counters["disk_pages_used"] == 4
    b.save("uvwxyz")
    got = b.counters["remote_got"]
    assert b.load("abcd") == 4
    assert b.counters["remote_got"] == got, "the disk is nearer"


def test_one_chain_from_three_tiers(replicas: Callable[..., Replica], tmp_path: Path) -> None:
    a, b = replicas(), replicas(tmp_path)
    b.save("ab")
    b.save("uvwxyz")
    a.save("abcde")
    assert b.fetch("abcdef") == 5
    assert b.store.fetched_span("abcdef") == (0, 5, [2, 3, 4])
    assert b.load("abcdef") == 5
    assert b.counters["remote_got"] == 3
    assert b.store.fetched_span("abcdef") == (0, 0, ()), "nothing is held any more"


def test_nothing_is_asked_for_what_the_device_has(replicas: Callable[..., Replica]) -> None:
    first, second = replicas(), replicas()
    first.save("aaaa")
    second.store.arrive("a", Chain(keys_of("aaaa")), on_device=4)
    second.store.poll()
    assert second.store.is_ready("a")
    assert second.counters["remote_lookups"] == 0
    second.store.arrive("a", Chain(keys_of("aaaa")), on_device=2)
    until(lambda: second.store.poll() or second.store.is_ready("a"), "a fetch hangs")
    assert (second.counters["remote_lookups"], second.counters["fetched"]) == (1, 4), (
        "the device has let go of some"
    )
    second.store.leave("a")
    second.store.check_invariants()


def test_two_requests_that_wait_for_the_same_pages_both_know_where_they_came_from(
    replicas: Callable[..., Replica], tmp_path: Path
) -> None:
    a, b = replicas(), replicas(tmp_path)
    a.save("abcd")
    chains = {name: Chain(keys_of("abcd")) for name in ("one", "two")}
    for name, chain in chains.items():
        b.store.arrive(name, chain)
    for name in chains:
        until(lambda name=name: b.store.poll() or b.store.is_ready(name), "a fetch hangs")
    spans = [b.store.fetched_span(name) for name in chains]
    for first, pages, remote_pages in spans:
        assert list(remote_pages) == list(range(first, first + pages))
    assert spans[0] == (0, 4, [0, 1, 2, 3])
    for name in chains:
        b.store.leave(name)


def test_a_damaged_page_ends_what_can_be_had(replicas: Callable[..., Replica]) -> None:
    a, b = replicas(), replicas()
    a.save("abcd")
    tier = a.store.remote
    a.store.host.arena.zero_()
    damaged = tier._objects.extent(keys_of("abc")[2], 0)
    tier._client.remove([damaged.key])
    tier._client.put([damaged])
    assert b.load("abcd") == 2
    assert b.counters["remote_damaged"] == 1
    assert b.save("abcd")
    assert b.load("abcd") == 4


def test_a_dropped_conversation_is_dropped_for_all(replicas: Callable[..., Replica]) -> None:
    a, b = replicas(), replicas()
    a.save("abc")
    assert b.load("abc") == 3
    assert a.store.drop(Chain(keys_of("abc"))) == 3
    until(lambda: a.store.remote.exist(keys_of("abc")).result() == [0, 0, 0], "it is still there")
    assert a.load("abc") == 0


def test_a_flush_forgets_what_was_known_and_leaves_what_others_use(replicas: Callable[..., Replica]) -> None:
    a, b = replicas(), replicas()
    a.save("abc")
    assert b.load("abc") == 3
    b.store.reset()
    assert (b.counters["remote_known"], b.counters["host_pages_used"]) == (0, 0)
    assert a.load("abc") == 3
    asked = b.counters["remote_lookups"]
    assert b.load("abc") == 3
    assert b.counters["remote_lookups"] == asked + 1


def test_updated_weights(replicas: Callable[..., Replica]) -> None:
    a, b = replicas(), replicas()
    a.save("abc")
    b.store.remote.pause()
    assert b.load("abc") == 0
    assert b.save("uv")
    b.store.reset()
    b.store.remote.serve(Fingerprint("m", "new", "float32", PAGE, b.store.layout.component_bytes, {}, {}))
    assert b.load("abc") == 0
    assert b.save("abcd")
    assert b.counters["remote_put"] == 4
    assert a.load("abcd") == 3


def test_a_master_that_is_lost_and_returns(master: Master, replicas: Callable[..., Replica]) -> None:
    a, b = replicas(), replicas()
    a.save("abc")
    assert b.load("abc") == 3
    master.kill()
    try:
        a.load("abcxyz")  # Asks, and finds the store gone.
        until(lambda: a.store.poll() or not a.counters["remote_healthy"], "nobody noticed")
        assert a.load("abc") == 3, "host memory is not lost with the master"
        assert a.save("abcd")
    finally:
        master.start()
    a.join()
    assert a.load("abcde") == 4, "what is in use is shared again"
    until(lambda: a.store.poll() or a.counters["remote_unshared"] == 0, "the pages are not shared again")
    assert a.store.flush(PATIENCE) == 0
    assert replicas().load("abcd") == 4


@pytest.mark.parametrize("with_disk", [False, True])
def test_random_turns_keep_the_invariants(
    replicas: Callable[..., Replica], tmp_path: Path, with_disk: bool
) -> None:
    servers = [replicas(tmp_path / str(i) if with_disk else None) for i in range(2)]
    turns = random.Random(7)
    loaded = 0
    for _ in range(120):
        prompt = "".join(turns.choices("ab", k=turns.randint(1, HOST_PAGES)))
        server = turns.choice(servers)
        if turns.random() < 0.5:
            server.save(prompt)
        elif turns.random() < 0.2:
            server.store.drop(Chain(keys_of(prompt)))
        else:
            loaded += server.load(prompt)
        server.store.check_invariants()
    assert loaded
