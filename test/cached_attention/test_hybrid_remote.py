"""Two servers with a hybrid model that share a real Mooncake store: what one computed, the other goes on from."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from hashlib import sha256
from itertools import count
from typing import NamedTuple

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from benchmark.mooncake import Master
from cached_attention.chain import Chain, PageRun
from cached_attention.fingerprint import Fingerprint
from cached_attention.hybrid_store import HybridStore
from cached_attention.layout import DevicePool
from cached_attention.tiers.remote import RemoteStats, RemoteTier
from cached_attention.tiers.remote_address import parse_remote
from cached_attention.trailing_store import TrailingStore

PAGE = 2
"""Tokens."""
DEVICE_PAGES = 12
HOST_PAGES, HOST_TRAILING = 10, 8
PATIENCE = 60.0
PROMPTS = ["aaaaaa", "aaabbbbb", "aacccc", "dddd"]


class Kind(NamedTuple):
    """See `HybridStore` and `CachedAttentionStore`."""

    span: int
    chain_pages: int


STATES, WINDOWS = Kind(1, 1), Kind(2, 3)


def keys_of(prompt: str) -> list[bytes]:
    return [sha256(prompt[: end + 1].encode()).digest() for end in range(len(prompt))]


def content(key: bytes, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(int.from_bytes(key[:4]) + seed)
    return torch.rand(PAGE, 1, 4, generator=generator)


def until(reached: Callable[[], object], what: str) -> None:
    deadline = time.monotonic() + PATIENCE
    while not reached():
        assert time.monotonic() < deadline, what
        time.sleep(0.002)


class Replica:
    """A server's stores over device pools whose pages have a content by their key."""

    def __init__(self, master: Master, kind: Kind) -> None:
        self.kind = kind
        self.kv, self.trailing = ([torch.zeros(DEVICE_PAGES * PAGE, 1, 4) for _ in "kv"] for _ in range(2))
        self.pools = pools = [DevicePool([buffers], PAGE) for buffers in (self.kv, self.trailing)]
        address = parse_remote("--remote", master.url("16MiB"))
        kv, beside = (
            RemoteTier(address, segment, self.fingerprint("", pool), probe_seconds=(0.1, 0.2))
            for segment, pool in zip((address.segment, 0), pools, strict=True)
        )
        size = HOST_TRAILING * pools[1].layout.stride
        trailing = TrailingStore(pools[1], size, None, beside, chain_pages=kind.chain_pages)
        size = HOST_PAGES * pools[0].layout.stride
        self.store = HybridStore(pools[0], size, None, kv, trailing=trailing, span=kind.span)
        self.batches = count()
        for _ in range(20):
            self.store.prefill_took(PAGE, 60.0)  # So that a fetch is always worth waiting for.
        until(lambda: all(each["remote_healthy"] for each in self.counters), "the store is not reached")

    def fingerprint(self, weights: str, pool: DevicePool) -> Fingerprint:
        what = {"pool": self.pools.index(pool)}
        return Fingerprint("m", weights, "float32", PAGE, pool.layout.component_bytes, {"tp_rank": 0}, what)

    @property
    def stores(self) -> tuple[HybridStore, TrailingStore]:
        return self.store, self.store.trailing

    def begin(self, weights: str) -> None:
        """With nothing, and other weights."""
        self.store.reset()
        for store, pool in zip(self.stores, self.pools, strict=True):
            assert store.remote is not None
            store.remote.serve(self.fingerprint(weights, pool))
            store.remote.stats = RemoteStats()

    @property
    def counters(self) -> list[dict[str, int]]:
        """Of the KV, and of what is kept beside it."""
        return [store.counters() for store in self.stores]

    def save(self, prompt: str, trailing: int = 100) -> None:
        """`trailing`: of how many of its last pages there is more than KV."""
        keys = keys_of(prompt)
        for page, key in enumerate(keys):
            for seed, buffer in enumerate(self.kv + self.trailing):
                buffer[page * PAGE : (page + 1) * PAGE] = content(key, seed)
        slots, first = torch.arange(len(keys) * PAGE), max(0, len(keys) - trailing)
        parent = keys[first - 1] if first and self.kind is WINDOWS else None
        beside = PageRun(parent, first, keys[first:], slots[first * PAGE :]) if trailing else None
        self.store.save(PageRun(None, 0, keys, slots), trailing=beside)
        self.store.flush(PATIENCE)
        until(self.store.poll, "a save hangs")
        assert self.store.pop_save()
        until(
            lambda: self.store.poll() or not any(each["remote_unshared"] for each in self.counters), "not shared"
        )

    def fetch(self, prompt: str) -> Chain:
        chain = Chain(keys_of(prompt))
        self.store.arrive(prompt, chain)
        until(lambda: self.store.poll() or self.store.is_ready(prompt), "a fetch hangs")
        return chain

    def load(self, prompt: str) -> int:
        """Fetch and load as much of `prompt` as can be gone on from; every byte is checked."""
        chain = self.fetch(prompt)
        end = next(self.store.ends(chain, self.store.reserve(prompt, chain)), 0)
        if end:
            self.store.reserve_tail(prompt, chain, end)
            tail = chain.keys[max(0, end - self.kind.span) : end]
            for buffer in self.kv + self.trailing:
                buffer.zero_()
            assert self.store.queue_load(prompt, chain.keys[:end], torch.arange(end * PAGE))
            assert self.store.queue_tail(prompt, tail, torch.arange(len(tail) * PAGE))
            batch = next(self.batches)
            self.store.start_load(batch)
            self.store.start_tail_load(batch)
            assert self.store.finish_load(batch)
            for buffers, keys, seed in ((self.kv, chain.keys[:end], 0), (self.trailing, tail, 2)):
                for page, key in enumerate(keys):
                    for number, buffer in enumerate(buffers, seed):
                        assert buffer[page * PAGE : (page + 1) * PAGE].equal(content(key, number))
        self.store.leave(prompt)
        self.store.end_pass()
        self.store.check_invariants()
        return end


Pair = Callable[[Kind], list[Replica]]


@pytest.fixture(scope="module")
def running(master: Master) -> Iterator[dict[Kind, list[Replica]]]:
    """Two replicas per kind: Mooncake takes its time to join and to leave."""
    made = {kind: [Replica(master, kind) for _ in range(2)] for kind in (STATES, WINDOWS)}
    yield made
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda one: one.store.close(), [one for pair in made.values() for one in pair]))


@pytest.fixture
def pair(running: dict[Kind, list[Replica]], request: pytest.FixtureRequest) -> Pair:
    """Two replicas of a model of this test's own, which have nothing."""

    def pair(kind: Kind) -> list[Replica]:
        for one in running[kind]:
            one.begin(request.node.name)
        return running[kind]

    return pair


kinds = pytest.mark.parametrize("kind", [STATES, WINDOWS], ids=["states", "windows"])


@kinds
def test_a_conversation_moves_to_another_server_and_back(pair: Pair, kind: Kind) -> None:
    a, b = pair(kind)
    a.save("aaa", trailing=kind.span)
    a.save("aaaaaa", trailing=0)
    assert b.load("aaaaaa") == 3
    kv, trailing = b.counters
    # Nothing is fetched that cannot be gone on from.
    assert (kv["remote_got"], trailing["remote_got"]) == (3, kind.span)
    b.save("aaaaa", trailing=kind.span)
    assert a.load("aaaaab") == 5
    assert b.load("dd") == 0


@kinds
def test_what_another_server_has_beside_the_kv_goes_with_kv_of_this_one(pair: Pair, kind: Kind) -> None:
    a, b = pair(kind)
    a.save("aaaa", trailing=kind.span)
    b.save("aaaaa", trailing=0)
    assert b.load("aaaaa") == 4
    kv, trailing = b.counters
    assert (kv["remote_got"], trailing["remote_got"]) == (0, kind.span)


@kinds
def test_kv_of_another_server_goes_with_what_this_one_has_beside_it(pair: Pair, kind: Kind) -> None:
    a, b = pair(kind)
    a.save("aaaa", trailing=0)
    b.save("aaaa", trailing=kind.span)
    a.save("aaaaaa", trailing=kind.span)
    assert b.load("aaaaaa") == 6
    kv, trailing = b.counters
    assert (kv["remote_got"], trailing["remote_got"]) == (2, kind.span)


@kinds
def test_what_came_from_elsewhere_is_found_again_here(pair: Pair, kind: Kind) -> None:
    a, b = pair(kind)
    a.save("aaaaaa")
    assert b.load("aaaaaa") == 6
    before = b.counters
    assert b.load("aaaaaad") == 6
    assert [each["remote_got"] for each in b.counters] == [each["remote_got"] for each in before]


@kinds
def test_a_dropped_conversation_is_dropped_for_all(pair: Pair, kind: Kind) -> None:
    a, b = pair(kind)
    a.save("aaa")
    assert b.load("aaa") == 3
    assert a.store.drop(Chain(keys_of("aaa"))) == 3
    tiers = [tier for tier in (a.store.remote, a.store.trailing.remote) if tier is not None]
    until(lambda: not any(any(tier.exist(keys_of("aaa")).result()) for tier in tiers), "it is still there")
    assert a.load("aaa") == 0


@kinds
def test_a_request_goes_on_from_an_earlier_end_if_a_later_one_is_gone(pair: Pair, kind: Kind) -> None:
    a, b = pair(kind)
    a.save("aa", trailing=kind.span)
    a.save("aaaa", trailing=kind.span)
    tier, last = a.store.trailing.remote, keys_of("aaaa")[-1:]
    assert tier is not None
    b.store.arrive("asks", Chain(keys_of("aaaa")))
    until(lambda: b.store.poll() or last[0] in b.store.trailing.remote_pages, "it is not found")
    b.store.leave("asks")
    b.store.reset()
    b.store.trailing._pages.remote.add(last, None)  # As if it was found a moment ago.
    tier.remove(last)
    until(lambda: not any(tier.exist(last).result()), "it is still there")
    assert b.load("aaaa") == (3 if kind is WINDOWS else 2)  # The window before the third page is whole.


@kinds
def test_a_request_goes_on_from_an_earlier_end_if_kv_is_gone(pair: Pair, kind: Kind) -> None:
    a, b = pair(kind)
    a.save("aa", trailing=kind.span)
    a.save("aaaa", trailing=kind.span)
    tier, gone = a.store.remote, keys_of("aaaa")[2:3]
    assert tier is not None
    b.store._pages.remote.add(keys_of("aaaa"), None)  # As if they were found a moment ago.
    tier.remove(gone)
    until(lambda: not any(tier.exist(gone).result()), "it is still there")
    assert b.load("aaaa") == 2


@kinds
def test_a_rank_among_several_leaves_the_decision_to_all(pair: Pair, kind: Kind) -> None:
    a, b = pair(kind)
    a.save("aaaa", trailing=kind.span)
    b.store.decides_alone = False
    chain = Chain(keys_of("aaaa"))
    assert b.store.arrive("asks", chain) == 0
    until(lambda: b.store.poll() or b.store.is_undecided("asks"), "it does not say that it found pages")
    until(
        lambda: b.store.poll() or next(b.store.held_ends(chain, b.store.restorable_pages(chain)), 0) == 4, "lost"
    )
    assert b.store.queued["asks"].end == 0
    assert b.store.arrive("asks", chain, end=4) == 4
    assert not b.store.is_undecided("asks")
    until(lambda: b.store.poll() or b.store.is_ready("asks"), "a fetch hangs")
    assert next(b.store.ends(chain, b.store.loadable_pages(chain))) == 4
    b.store.leave("asks")
    b.store.decides_alone = True


@kinds
def test_random_histories_of_two_servers(pair: Pair, kind: Kind) -> None:
    run = count()
    steps = st.tuples(
        st.sampled_from(["save", "load", "reset"]),
        st.integers(0, 1),
        st.sampled_from(PROMPTS),
        st.integers(1, 8),
        st.integers(0, 3),
    )

    @settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.too_slow])
    @given(st.lists(steps, min_size=4, max_size=24))
    def histories(history: list[tuple[str, int, str, int, int]]) -> None:
        servers, saved, name = pair(kind), set[bytes](), f"{kind} {next(run)}"
        for server in servers:
            server.begin(name)
        for action, number, prompt, length, trailing in history:
            server, keys = servers[number], keys_of(prompt[:length])
            if action == "save":
                server.save(prompt[:length], trailing)
                saved.update(keys)
            elif action == "load":
                assert saved.issuperset(keys[: server.load(prompt[:length])])
            else:
                server.store.reset()

    histories()
