"""A subscriber over ZMQ, with upstream's own classes, knows what the store holds."""

from __future__ import annotations

import random
import time
from array import array
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from sglang.srt.disaggregation.kv_events import (
    AllBlocksCleared,
    BlockRemoved,
    BlockStored,
    KVEventBatch,
    StorageMedium,
    ZmqEventPublisher,
)
from sglang.srt.mem_cache.cache_init_params import CacheInitParams
from sglang.srt.mem_cache.cached_attention import kv_events
from sglang.srt.mem_cache.cached_attention.block_names import BlockNames
from sglang.srt.mem_cache.cached_attention.kv_events import KvEvents
from sglang.srt.mem_cache.events import KVCacheEventRecorder, KvEventLoraNames
from sglang.srt.mem_cache.radix_cache import RadixKey, TreeNode
from sglang.srt.mem_cache.utils import get_storage_hash_str

from benchmark.mooncake import Master
from cached_attention import admission
from cached_attention.chain import Chain, PageRun
from cached_attention.fingerprint import Fingerprint
from cached_attention.layout import DevicePool
from cached_attention.position.rotation import Rotation
from cached_attention.residency import ResidentPage
from cached_attention.store import CachedAttentionStore
from cached_attention.tiers.disk import DiskTier
from cached_attention.tiers.host import HostTier
from cached_attention.tiers.remote import RemoteTier
from cached_attention.tiers.remote_address import parse_remote
from examples.kv_events import Subscriber

PAGE, SINK, STEP, WINDOW = 2, 1, 3, 8
"""Tokens per page; then pages that are always kept, that are dropped at a time, that fit the window."""
HOST_PAGES, DEVICE_PAGES = 12, 12
TTL = 5_000.0
NAMESPACES: dict[str, dict[str, str]] = {
    "plain": {},
    "tenant": {"extra_key": "tenant"},
    "salted": {"cache_salt": "salt"},
    "both": {"extra_key": "tenant", "cache_salt": "pepper"},
}
WORDS = ("here", "there")
"""What is said; the same in every namespace."""

Stored = set[tuple[str, int]]
"""Medium and block hash of each block."""


def prompt(namespace: str, words: str, pages: int) -> RadixKey:
    """A conversation of so many pages, or what is left of it, in the namespace of what was dropped."""
    drop = 0 if pages <= WINDOW else -(-(pages - WINDOW) // STEP) * STEP
    kept = [page for page in range(pages) if page < SINK or page >= SINK + drop]
    tokens = array("q", [WORDS.index(words) * 1000 + page * PAGE + i for page in kept for i in range(PAGE)])
    space = dict(NAMESPACES[namespace])
    if drop:
        space["extra_key"] = f"{space.get('extra_key', '')}|truncated:{drop}"
    return RadixKey(tokens, **space)


def keys_of(key: RadixKey) -> list[bytes]:
    return [bytes.fromhex(digest) for digest in get_storage_hash_str(key, page_size=PAGE)]


def on_device(key: RadixKey, params: CacheInitParams) -> list[int]:
    """What upstream calls the pages of `key` when they are on the device."""
    recorder = KVCacheEventRecorder(
        enabled=True,
        page_size=PAGE,
        dynamo_format=params.dynamo_kv_event_format,
        lora_names=params.kv_event_lora_names,
    )
    root, node = TreeNode(), TreeNode()
    root.key, root.hash_value = RadixKey(array("q"), key.extra_key, cache_salt=key.cache_salt), []
    node.key, node.parent = key, root
    recorder.record_store(node)
    return [block for event in recorder.take() for block in event.block_hashes]


class Server:
    """A store with its events and upstream's publisher, as a scheduler has them, and conversations over it.

    Args:
        remote: URL of a remote store.
    """

    def __init__(
        self, directory: Path, buffer_steps: int = 10_000, remote: str | None = None, **params: Any
    ) -> None:
        self.directory = directory
        self.url = remote
        self.params = CacheInitParams(False, None, None, PAGE, **params)  # type: ignore[arg-type]
        buffers = [[torch.zeros(DEVICE_PAGES * PAGE, 1, 4) for _ in "kv"] for _ in range(2)]
        self.pool = DevicePool(buffers, PAGE)
        self.now, self.buffer_steps = 1000.0, buffer_steps
        self.watch = 0.0
        """What the events take for the time, in seconds; the store's runs on with every look."""
        self.hashes: dict[bytes, int] = {}
        """What upstream calls the pages of all prompts so far."""
        self.lengths: dict[tuple[str, str], int] = {}
        self.start()

    def start(self) -> None:
        size = HOST_PAGES * self.pool.layout.stride
        rotations = [Rotation((1.0, 0.1))] * 2
        disk, remote = self.open_disk(), None if self.url is None else reach(self.url, self.fingerprint)
        self.store = CachedAttentionStore(
            self.pool, size, disk, remote, rotations=rotations, ttl=TTL, clock=self.tick
        )
        self.join()
        for _ in range(20):
            self.store.prefill_took(PAGE, 60.0)  # So that a fetch is always worth waiting for.
        self.events = KvEvents(self.store.residency, self.params, lambda: self.watch)
        self.named: set[bytes] = set()
        """Pages of the prompts that came since the start."""
        self.publisher = ZmqEventPublisher(0, *self.endpoints, buffer_steps=self.buffer_steps)
        self.published = 0
        self.publish([AllBlocksCleared()])

    @property
    def fingerprint(self) -> Fingerprint:
        return Fingerprint("m", "w", "float32", PAGE, self.pool.layout.component_bytes, {}, {})

    def open_disk(self) -> DiskTier:
        return DiskTier(self.directory, self.fingerprint, 4 << 20)

    def join(self) -> None:
        """Wait until the remote store, where there is one, is in service."""
        if (remote := self.store.remote) is not None:
            self._wait_for(lambda: remote.healthy)

    @property
    def endpoints(self) -> tuple[str, str]:
        return f"ipc://{self.directory}/live", f"ipc://{self.directory}/replay"

    def tick(self) -> float:
        self.now += 1
        return self.now

    def publish(self, events: list[Any]) -> None:
        if events:
            self.published_at = time.time()
            self.publisher.publish(KVEventBatch(ts=self.published_at, events=events))
            self.published += 1

    def end_passes(self) -> None:
        """Publish all that there is to be published, the tiers' events of each pass in a batch."""
        while events := self.events.take():
            self.publish(events)

    def turn(self, namespace: str, words: str, pages: int) -> None:
        key = prompt(namespace, words, pages)
        keys = keys_of(key)
        self.hashes.update(zip(keys, on_device(key, self.params), strict=True))
        self.events.learn(keys, key)
        self.named.update(keys)
        earlier = [keys_of(prompt(namespace, words, length)) for length in range(pages, 0, -1)]
        chain, name = Chain(keys), f"{namespace} {words}"
        self.store.left_device(keys)
        self.store.alias(chain, [self._source(namespace, words, pages, len(known)) for known in earlier])
        self.store.arrive(name, chain)
        self._wait_for(lambda: self.store.is_ready(name))
        self.store.leave(name)
        self.store.save(PageRun(None, 0, keys, torch.arange(len(keys) * PAGE)))
        self._wait_for(lambda: self.store.poll() > 0)
        self.store.pop_save()

    def _source(self, namespace: str, words: str, pages: int, length: int) -> list[bytes | None]:
        """The keys under which the tokens of a prompt were known when it had `length` pages."""
        then = prompt(namespace, words, length)
        known = dict(zip(_pages(then), keys_of(then), strict=True))
        return [known.get(page) for page in _pages(prompt(namespace, words, pages))]

    def _wait_for(self, condition: Any) -> None:
        deadline = time.monotonic() + 60
        while not condition():
            assert time.monotonic() < deadline, "nothing moves"
            self.store.poll()
            time.sleep(0.0005)

    def settle(self) -> None:
        self._wait_for(lambda: self.store.flush(1.0) == 0)

    def restart(self) -> None:
        self.settle()
        self.store.close()
        self.publisher.shutdown()
        self.start()

    def reset(self) -> None:
        """As `UnifiedRadixCache.reset` does it: the store first, then the tree above it."""
        self.store.reset()
        self.publish([AllBlocksCleared()])

    def update_weights(self) -> None:
        """Away from the tiers' fingerprint and back to it."""
        self.settle()
        if self.store.remote is not None:
            self.store.remote.pause()
        self.store.detach_disk()
        self.store.replace_disk(self.open_disk)
        if self.store.remote is not None:
            self.store.remote.serve(self.fingerprint)
        self.publish([AllBlocksCleared()])

    def lose(self, key: bytes) -> None:
        """What a damaged record on disk leads to, when it is read."""
        pages = self.store._pages
        row = pages.index.find(key)
        if row in pages.on_disk and not pages.index.pins[row]:
            self.store.disk.remove(pages.lose(row))  # type: ignore[union-attr]

    def lose_all_remotely(self) -> None:
        """The remote store drops what it has, without a word."""
        self.store.remote._client._call.remove_all(True)  # type: ignore[union-attr]

    def lose_master(self, master: Master) -> None:
        remote = self.store.remote
        assert remote is not None
        master.kill()
        remote.exist([b"probe"]).result(60)
        assert not remote.healthy
        self.store.poll()
        master.start()
        self.join()

    @property
    def resident(self) -> Stored:
        """What the store holds, looked up page by page in its columns."""
        pages, stored = self.store._pages, set()
        for row in pages.index.rows():
            key = pages.index.key(row)
            name = self.hashes[key] if key in self.named else int.from_bytes(key[:8], signed=True)
            if row in pages.in_host and pages.in_host.ready[row]:
                stored.add(("CPU_PINNED", name))
            if row in pages.on_disk:
                stored.add(("DISK", name))
        for key in pages.remote._known:
            stored.add(("EXTERNAL", self.hashes[key]))
        return stored

    def close(self) -> None:
        self.store.check_invariants()
        self.store.close()
        self.publisher.shutdown()


def _pages(key: RadixKey) -> list[int]:
    return [token % 1000 // PAGE for token in key.token_ids[::PAGE]]


def reach(url: str, fingerprint: Fingerprint) -> RemoteTier:
    address = parse_remote("--remote", url)
    return RemoteTier(address, address.segment, fingerprint, probe_seconds=(0.1, 0.2))


@pytest.fixture
def lender(master: Master) -> Iterator[Master]:
    """A remote store in the memory of another server, which outlives the one that is tested."""
    pool = DevicePool([[torch.zeros(PAGE, 1, 4) for _ in "kv"] for _ in range(2)], PAGE)
    layout = pool.layout
    other = reach(master.url("16MiB"), Fingerprint("m", "w", "float32", PAGE, layout.component_bytes, {}, {}))
    other.open(HostTier(layout, 8 * layout.stride))
    yield master
    other.close()


class Router(Subscriber):
    def __init__(self, server: Server, replays: bool = True) -> None:
        live, replay = server.endpoints
        super().__init__(live, replay if replays else None)
        self.join()

    def hear_all(self, server: Server) -> Stored:
        """The picture once all that the server has published has come."""
        server.end_passes()
        deadline = time.monotonic() + 60
        while (self._next, self._time) != (server.published, server.published_at):
            assert time.monotonic() < deadline, f"{self._next} of {server.published} messages came"
            if not self.poll(0.05):
                self.join()
        return self.known

    @property
    def known(self) -> Stored:
        return {(str(medium), block) for medium, blocks in self.picture.stored.items() for block in blocks}


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Server]:
    server = Server(tmp_path)
    yield server
    server.close()


@pytest.fixture
def router(server: Server) -> Iterator[Router]:
    router = Router(server)
    yield router
    router.close()


@pytest.fixture(params=["disk", "remote"])
def any_server(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Server]:
    """Over disk, and over a remote store as well."""
    remote = None
    if request.param == "remote":
        remote = request.getfixturevalue("lender").url("0")
    server = Server(tmp_path, remote=remote)
    yield server
    server.close()


def test_after_a_thousand_random_operations_the_picture_is_that_of_the_store(any_server: Server) -> None:
    server, router = any_server, Router(any_server)
    chance = random.Random(3)

    def turn() -> None:
        who = chance.choice(list(NAMESPACES)), chance.choice(WORDS)
        before = server.lengths.get(who, 0)
        server.lengths[who] = length = before + chance.randint(1, 4) if before < 18 else 1
        server.turn(*who, length)

    def some_key() -> bytes:
        return chance.choice(list(server.hashes))

    def drop() -> None:
        server.store.drop(server.store.chain_to(some_key()))

    def wait() -> None:
        server.now += chance.choice([10, TTL / 2, TTL])
        server.watch += kv_events.REPEAT_EVERY / 4
        server.store.poll()

    often = [turn] * 60 + [drop] * 8 + [server.settle] * 12 + [lambda: server.lose(some_key())] * 4
    seldom = [wait] * 6 + [server.restart] * 2 + [server.reset] * 2 + [server.update_weights] * 2
    if server.url is not None:
        often, seldom = 4 * often, [*seldom, *[server.lose_all_remotely] * 4]  # Mooncake takes its time to leave.
    kinds: Stored = set()
    for operation in chance.choices(often + seldom, k=1000):
        if operation is not turn and not server.hashes:
            continue
        operation()
        if chance.random() < 0.3:
            server.end_passes()
        if chance.random() < 0.1:
            assert router.hear_all(server) == server.resident
            kinds |= {(medium, 0) for medium, _ in server.resident}
    assert router.hear_all(server) == server.resident
    assert router.picture.whole
    assert len(kinds) == (2 if server.url is None else 3)
    counters = server.store.counters()
    assert counters["host_pages_used"] <= len(server.resident)
    router.close()


def test_the_remote_tier(lender: Master, tmp_path: Path) -> None:
    """Told when this server has put a page or found it, until it finds it gone or the store is out of reach."""
    server = Server(tmp_path, remote=lender.url("0"))
    router = Router(server)
    server.turn("salted", "here", 3)
    server.settle()
    device = on_device(prompt("salted", "here", 3), server.params)
    external = {("EXTERNAL", block) for block in device}
    assert router.hear_all(server) >= external

    server.reset()
    server.turn("salted", "here", 3)
    server.settle()
    assert router.hear_all(server) == server.resident >= external
    stored = [event for event in server.events._feed.walk(0, server.events._feed.end) if event.tier == "remote"]
    keys = keys_of(prompt("salted", "here", 3))
    assert {(page.key, page.parent) for page in stored} == set(zip(keys, [None, *keys], strict=False))

    server.store.drop(Chain(keys))
    assert not router.hear_all(server)

    server.turn("salted", "here", 3)
    server.settle()
    server.lose_master(lender)
    assert router.hear_all(server) == server.resident
    assert not external & router.known
    router.close()
    server.close()


@pytest.mark.parametrize("namespace", NAMESPACES)
@pytest.mark.parametrize("dynamo", [False, True])
def test_blocks_have_the_names_that_they_have_on_the_device(tmp_path: Path, namespace: str, dynamo: bool) -> None:
    names = KvEventLoraNames()
    server = Server(tmp_path, dynamo_kv_event_format=dynamo, kv_event_lora_names=names)
    events: list[Any] = []
    for pages in (5, 7):
        server.turn(namespace, "here", pages)
        events += server.events.take()
    key = prompt(namespace, "here", 7)
    stored = [event for event in events if isinstance(event, BlockStored)]
    in_host = [event for event in stored if event.medium == StorageMedium.CPU]
    assert [block for event in in_host for block in event.block_hashes] == on_device(key, server.params)
    assert [token for event in in_host for token in event.token_ids] == list(key.token_ids)
    assert {event.block_size for event in in_host} == {PAGE}
    assert {event.cache_salt for event in in_host} == {key.cache_salt}
    assert [event.parent_block_hash for event in in_host] == [None, on_device(key, server.params)[4]]
    server.close()


@pytest.mark.parametrize("namespace", NAMESPACES)
def test_with_eagle_blocks_are_pairs_of_tokens(namespace: str) -> None:
    params = CacheInitParams(False, None, None, PAGE)  # type: ignore[arg-type]
    plain = prompt(namespace, "here", 4)
    key = RadixKey(plain.token_ids, plain.extra_key, is_bigram=True, cache_salt=plain.cache_salt)
    key = key.page_aligned(PAGE)
    names, keys = BlockNames(params, lambda _: True), keys_of(key)
    names.learn(keys, key)
    assert len(keys) == 3
    assert [names.name(page).block_hash for page in keys] == on_device(key, params)
    assert [pair for page in keys for pair in names.tokens(page) or ()] == list(key)


def test_an_adapter_has_a_namespace_with_its_name(tmp_path: Path) -> None:
    names = KvEventLoraNames()
    names._names["tenant"] = "adapter"
    server = Server(tmp_path, kv_event_lora_names=names)
    server.turn("tenant", "here", 3)
    (stored,) = server.events.take()
    assert isinstance(stored, BlockStored)
    assert stored.lora_name == "adapter"
    assert stored.block_hashes == on_device(prompt("tenant", "here", 3), server.params)
    server.close()


def test_a_page_on_its_way_is_not_stored(server: Server) -> None:
    key = prompt("plain", "here", 2)
    pages = server.store._pages
    first = admission.admit(pages, keys_of(key)[0], None, 0)
    assert first is not None
    assert not server.events.take()
    pages.land(first, clean=True)
    (stored,) = server.events.take()
    assert stored.block_hashes == on_device(key, server.params)[:1]
    second = admission.admit(pages, keys_of(key)[1], keys_of(key)[0], PAGE)
    assert second is not None
    pages.give_up(second)
    assert not server.events.take(), "a page that never arrived never left"
    pages.unpin(second)
    pages.unpin(first)


def test_blocks_of_the_same_name_are_one_until_the_last_is_gone(server: Server, router: Router) -> None:
    """SGLang's block hashes leave `extra_key` out, so two tenants' pages of the same tokens have one."""
    server.turn("plain", "here", 2)
    server.turn("tenant", "here", 2)
    server.settle()
    assert len(router.hear_all(server)) == 4
    for namespace, left in (("plain", 4), ("tenant", 0)):
        server.store.drop(Chain(keys_of(prompt(namespace, "here", 2))))
        assert len(router.hear_all(server)) == left
        assert router.known == server.resident


def test_a_page_from_an_earlier_run_gets_its_name_from_the_first_request(server: Server, router: Router) -> None:
    server.turn("salted", "here", 3)
    server.restart()
    nameless = router.hear_all(server)
    assert nameless == {("DISK", int.from_bytes(key[:8], signed=True)) for key in server.hashes}
    server.turn("salted", "here", 3)
    device = on_device(prompt("salted", "here", 3), server.params)
    assert router.hear_all(server) == {(medium, block) for medium in ("CPU_PINNED", "DISK") for block in device}


def test_pages_whose_tokens_are_unknown_have_none(server: Server) -> None:
    server.turn("plain", "here", 3)
    server.restart()
    (stored,) = server.events.take()
    assert isinstance(stored, BlockStored)
    assert (stored.token_ids, stored.block_size, len(stored.block_hashes)) == ([], 0, 3)


def test_adopted_pages_come_in_batches(server: Server, router: Router, monkeypatch: pytest.MonkeyPatch) -> None:
    for namespace in NAMESPACES:
        server.turn(namespace, "here", 6)
        server.settle()
    server.restart()
    monkeypatch.setattr(kv_events, "BATCH_BLOCKS", 5)
    batches = [server.events.take() for _ in range(30)]
    told = [sum(len(event.block_hashes) for event in batch) for batch in batches]
    assert sum(told) == 24
    assert max(told) <= 5
    for batch in batches:
        server.publish(batch)
    assert router.hear_all(server) == server.resident


def test_one_who_joins_late_is_told_everything(server: Server) -> None:
    for namespace in NAMESPACES:
        server.turn(namespace, "there", 5)
        server.end_passes()
    late = Router(server)
    assert late.hear_all(server) == server.resident != set()
    assert late.picture.whole
    late.close()


def test_a_lost_message_is_replayed(server: Server, router: Router) -> None:
    server.turn("plain", "here", 4)
    router.hear_all(server)
    server.turn("plain", "there", 8)
    server.turn("tenant", "there", 8)
    server.end_passes()
    assert router._live.poll(10_000)
    router._live.recv_multipart()
    server.turn("plain", "here", 5)
    assert router.hear_all(server) == server.resident
    assert router.picture.whole


def test_what_cannot_be_replayed_is_repeated(tmp_path: Path) -> None:
    """The buffer for replays is short; all that is stored is told again in time."""
    server = Server(tmp_path, buffer_steps=2)
    for namespace in NAMESPACES:
        server.turn(namespace, "there", 5)
        server.settle()
        server.end_passes()
    late = Router(server)
    assert late.hear_all(server) < server.resident
    assert not late.picture.whole
    server.watch += kv_events.REPEAT_EVERY
    assert late.hear_all(server) == server.resident
    late.close()
    server.close()


def test_a_server_started_anew_is_noticed(server: Server, router: Router) -> None:
    server.turn("plain", "here", 6)
    router.hear_all(server)
    server.restart()
    server.turn("tenant", "there", 2)
    assert router.hear_all(server) == server.resident


def test_removals_share_an_event(server: Server) -> None:
    keys = keys_of(prompt("plain", "here", 6))
    server.turn("plain", "here", 6)
    server.events.take()
    for key in keys:
        server.events.left("host", key)
    server.events.left("disk", keys[0])
    in_host, on_disk = server.events.take()
    assert in_host == BlockRemoved(on_device(prompt("plain", "here", 6), server.params), StorageMedium.CPU)
    assert on_disk.medium == StorageMedium.DISK


def test_pages_are_told_in_chains() -> None:
    def page(name: str, parent: str | None, tier: str = "disk") -> ResidentPage:
        return ResidentPage(tier, name.encode(), None if parent is None else parent.encode())

    pages = [
        page("c", "b"),
        page("x", "b"),
        page("b", "a"),
        page("z", "gone"),
        page("a", None),
        page("b", "a", "host"),
    ]
    told = list(kv_events.in_chains(pages))
    assert sorted(told) == sorted(pages)
    place = {(each.tier, each.key): at for at, each in enumerate(told)}
    assert place["disk", b"b"] == place["disk", b"a"] + 1
    assert place["disk", b"b"] + 1 in (place["disk", b"c"], place["disk", b"x"])
