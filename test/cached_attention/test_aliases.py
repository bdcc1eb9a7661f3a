"""Truncated conversations over host memory and disk: kept pages are the originals, rotated once."""

from __future__ import annotations

import shutil
import tempfile
import time
from collections.abc import Iterator
from hashlib import sha256
from pathlib import Path

import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from cached_attention.chain import Chain, PageRun
from cached_attention.fingerprint import Fingerprint
from cached_attention.layout import DevicePool
from cached_attention.position.delta_table import delta_table
from cached_attention.position.rotation import Rotation, rotate
from cached_attention.store import CachedAttentionStore
from cached_attention.tiers.disk import DiskTier

PAGE, SINK, STEP, WINDOW = 2, 1, 3, 8
"""Tokens per page; then pages that are always kept, that are dropped at a time, that fit the window."""
HOST_PAGES, DEVICE_PAGES = 12, 40
ROTATION = Rotation((1.0, 0.1))


def content(key: bytes) -> torch.Tensor:
    """What the page `key` holds where it is computed, `[PAGE, 1, 4]`."""
    generator = torch.Generator().manual_seed(int.from_bytes(key[:4]))
    return torch.rand(PAGE, 1, 4, generator=generator)


def rotated(keys: torch.Tensor, delta: int) -> torch.Tensor:
    return rotate(keys, delta_table(ROTATION, [delta]), ROTATION) if delta else keys


def dropped(pages: int) -> int:
    """Pages to drop from a prompt of so many."""
    return 0 if pages <= WINDOW else -(-(pages - WINDOW) // STEP) * STEP


def kept(pages: int, drop: int) -> list[int]:
    """Pages of the prompt that a drop leaves."""
    return [page for page in range(pages) if page < SINK or page >= SINK + drop]


def keys_of(name: str, pages: int, drop: int) -> list[bytes]:
    """The chain of the kept pages of a conversation, in the namespace of its drop."""
    keys, digest = [], f"{name} {drop}".encode() if drop else name.encode()
    for page in kept(pages, drop):
        digest = sha256(digest + str(page).encode()).digest()
        keys.append(digest)
    return keys


def sources(name: str, pages: int, drop: int) -> Iterator[list[bytes | None]]:
    for earlier in range(drop - STEP, -1, -STEP):
        known = dict(zip(kept(pages, earlier), keys_of(name, pages, earlier), strict=True))
        yield [known.get(page) if _fits(page, earlier) else None for page in kept(pages, drop)]


def _fits(page: int, drop: int) -> bool:
    """Whether the window with `drop` reaches `page`."""
    return page < drop + WINDOW


class Conversations:
    """Conversations that grow and overflow, on a device whose pages are checked to be what they must be."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.buffers = [[torch.zeros(DEVICE_PAGES * PAGE, 1, 4) for _ in "kv"] for _ in range(2)]
        self.pool = DevicePool(self.buffers, PAGE)
        self.now, self.batch = 1000.0, 0
        self.originals: dict[bytes, int] = {}
        """Per key under which a page was computed: its place then."""
        self.open()

    def open(self) -> None:
        size = HOST_PAGES * self.pool.layout.stride
        layout = self.pool.layout.component_bytes
        fingerprint = Fingerprint("m", "w", "float32", PAGE, layout, {"tp_rank": 0}, {})
        self.store = CachedAttentionStore(
            self.pool,
            size,
            DiskTier(self.directory, fingerprint, 4 << 20),
            rotations=[ROTATION, ROTATION],
            clock=self.tick,
        )
        for _ in range(20):
            self.store.prefill_took(PAGE, 60.0)  # So that a fetch is always worth waiting for.

    def tick(self) -> float:
        self.now += 1
        return self.now

    def page(self, buffer: torch.Tensor, page: int) -> torch.Tensor:
        return buffer[page * PAGE : (page + 1) * PAGE]

    def turn(self, name: str, pages: int, on_device: int = 0) -> int:
        """The conversation has so many pages now; returns how many of the kept ones were loaded.

        The first `on_device` of them are still on the device from the turn before.
        """
        drop = dropped(pages)
        keys = keys_of(name, pages, drop)
        chain = Chain(keys)
        self.store.left_device(keys[on_device:])
        self.store.alias(chain, sources(name, pages, drop))
        self.fetch(name, chain)
        loaded = self.load(name, keys, on_device)
        for place in range(max(loaded, on_device), len(keys)):
            self.originals[keys[place]] = place
            self._write(place, keys[place], 0)
        self.store.save(PageRun(None, 0, keys, torch.arange(len(keys) * PAGE)))
        self.store._saves.wait()
        self.store.poll()
        self.store.pop_save()
        return loaded

    def _write(self, place: int, original: bytes, delta: int) -> None:
        for k, v in self.buffers:
            self.page(k, place)[:] = rotated(content(original), delta)
            self.page(v, place)[:] = content(original)

    def fetch(self, name: str, chain: Chain) -> None:
        self.store.arrive(name, chain)
        deadline = time.monotonic() + 20
        while not self.store.is_ready(name):
            assert time.monotonic() < deadline, "a fetch hangs"
            time.sleep(0.001)
            self.store.poll()

    def load(self, name: str, keys: list[bytes], on_device: int) -> int:
        pages = self.store.reserve(name, Chain(keys))
        if pages <= on_device:
            self.store.cancel_load(name)
            return 0
        slots = torch.arange(on_device * PAGE, pages * PAGE)
        assert self.store.queue_load(name, keys[on_device:pages], slots)
        self.batch += 1
        self.store.start_load(self.batch)
        assert self.store.finish_load(self.batch)
        self.store.end_pass()
        for place in range(on_device, pages):
            self.check(keys[place], place)
        return pages

    def check(self, key: bytes, place: int) -> None:
        """The device page is the original, as saved, rotated once to where it is now."""
        index = self.store._index
        row = index.find(key)
        original = index.key(index.origin(row))
        computed_at = self.originals[original]
        assert index.position[row] == computed_at * PAGE
        delta = (place - computed_at) * PAGE
        for k, v in self.buffers:
            assert torch.equal(self.page(v, place), content(original))
            assert torch.equal(self.page(k, place), rotated(content(original), delta))

    def settle(self) -> None:
        deadline = time.monotonic() + 20
        while self.store.flush(1.0) and time.monotonic() < deadline:
            pass

    def restart(self) -> None:
        self.settle()
        self.store.close()
        self.open()


@pytest.fixture
def talk(tmp_path: Path) -> Iterator[Conversations]:
    conversations = Conversations(tmp_path)
    yield conversations
    conversations.store.check_invariants()
    conversations.store.close()


def test_after_an_overflow_everything_kept_is_loaded(talk: Conversations) -> None:
    talk.turn("a", 8)
    assert talk.turn("a", 9) == 5, "the sink, and pages 4 to 7"
    before = talk.store.counters()["host_pages_used"]
    assert before == 9, "kept pages are not copied"
    assert talk.turn("a", 10) == 6
    assert talk.turn("a", 12) == 4, "the sink, and pages 7 to 9"


def test_a_page_that_got_another_name_while_it_was_saved_comes_back_from_disk(talk: Conversations) -> None:
    keys = keys_of("a", 8, 0)
    for place, key in enumerate(keys):
        talk.originals[key] = place
        talk._write(place, key, 0)
    talk.store.save(PageRun(None, 0, keys, torch.arange(len(keys) * PAGE)))
    talk.store.alias(Chain(keys_of("a", 9, 3)), sources("a", 9, 3))  # The bytes have not landed yet.
    talk.store._saves.wait()
    talk.settle()
    for name in "bc":  # Host memory holds neither of them and "a".
        talk.turn(name, 8)
        talk.settle()
    fetched = talk.store.counters()["fetched"]
    assert talk.turn("a", 9) == 5
    assert talk.store.counters()["fetched"] > fetched
    assert talk.store.counters()["lost"] == 0


def test_fifty_truncations_in_a_row(talk: Conversations) -> None:
    """Each page is loaded as its original, turned once: `check` compares to the bit."""
    pages = WINDOW
    talk.turn("a", pages)
    for _ in range(50):
        talk.settle()
        pages += STEP
        assert talk.turn("a", pages) == WINDOW - STEP
    assert talk.store.counters()["host_pages_used"] <= HOST_PAGES


def test_a_restart_knows_what_was_kept(talk: Conversations) -> None:
    talk.turn("a", 8)
    talk.turn("a", 11)
    talk.restart()
    assert talk.turn("a", 11) == 8
    talk.restart()
    assert talk.turn("a", 13) == 13 - 6 - 2


def test_a_rotated_copy_is_not_saved_when_the_original_is_gone(talk: Conversations) -> None:
    talk.turn("a", 8)
    talk.turn("a", 11)
    talk.settle()
    chain = Chain(keys_of("a", 11, dropped(11)))
    talk.store.drop(chain)
    talk.store.drop(Chain(keys_of("a", 8, 0)))
    assert talk.store.resident_pages == 0
    declined = talk.store.counters()["declined"]
    talk.turn("a", 11, on_device=8)
    assert talk.store.counters()["declined"] > declined
    assert talk.store.restorable_pages(Chain(chain.keys)) <= SINK


def test_without_rotations_nothing_is_shared(tmp_path: Path) -> None:
    talk = Conversations(tmp_path)
    talk.store.close()
    pool = talk.pool
    talk.store = CachedAttentionStore(pool, HOST_PAGES * pool.layout.stride)
    talk.turn("a", 8)
    assert talk.turn("a", 9) == 0
    talk.store.close()


class Overflowing(RuleBasedStateMachine):
    """Conversations at random, with evictions, restarts and pages that stay on the device."""

    @initialize()
    def start(self) -> None:
        self.directory = Path(tempfile.mkdtemp())
        self.talk = Conversations(self.directory)
        self.pages = dict.fromkeys("abc", 1)
        self.last: tuple[str, int] | None = None

    def teardown(self) -> None:
        if hasattr(self, "talk"):
            self.talk.store.close()
            shutil.rmtree(self.directory)

    @rule(name=st.sampled_from("abc"), more=st.integers(0, 5))
    def turn(self, name: str, more: int) -> None:
        before = self.pages[name]
        self.pages[name] = before + more
        stays = 0
        if self.last == (name, before) and dropped(before) == dropped(before + more):
            stays = len(kept(before, dropped(before)))
        self.talk.turn(name, self.pages[name], stays)
        self.last = name, self.pages[name]

    @rule(name=st.sampled_from("abc"))
    def begin_anew(self, name: str) -> None:
        self.pages[name] = 1

    @rule()
    def settle(self) -> None:
        self.talk.settle()

    @precondition(lambda self: self.last is not None)
    @rule()
    def restart(self) -> None:
        self.talk.restart()
        self.last = None

    @invariant()
    def whole(self) -> None:
        if hasattr(self, "talk"):
            self.talk.store.check_invariants()
            assert self.talk.store.resident_pages <= HOST_PAGES


TestOverflowing = Overflowing.TestCase
TestOverflowing.settings = settings(max_examples=30, stateful_step_count=30, deadline=None)
