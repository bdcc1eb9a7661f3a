"""Truncated conversations over host memory and disk: kept pages are the originals, rotated once."""

from __future__ import annotations

import shutil
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from hashlib import sha256
from pathlib import Path

import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from cached_attention import admission
from cached_attention.aliases import Aliases
from cached_attention.chain import Chain, PageRun
from cached_attention.fingerprint import Fingerprint
from cached_attention.hierarchy import Hierarchy
from cached_attention.layout import DevicePool
from cached_attention.position.delta_table import delta_table
from cached_attention.position.rotation import Rotation, rotate
from cached_attention.store import CachedAttentionStore
from cached_attention.tiers.disk import DiskTier
from cached_attention.tiers.host_slots import HostSlots

PAGE, SINK, STEP, WINDOW = 2, 1, 3, 8
"""Tokens per page; then pages that are always kept, that are dropped at a time, that fit the window."""
HOST_PAGES, DEVICE_PAGES = 12, 40
ROTATION = Rotation((1.0, 0.1))
LIFE = 100_000.0
"""Seconds; time to live of random conversations, whose clock moves by a second whenever it is read."""


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

    def __init__(self, directory: Path, ttl: float | None = None) -> None:
        self.directory = directory
        self.ttl = ttl
        self.buffers = [[torch.zeros(DEVICE_PAGES * PAGE, 1, 4) for _ in "kv"] for _ in range(2)]
        self.pool = DevicePool(self.buffers, PAGE)
        self.now, self.batch = 1000.0, 0
        self.originals: dict[bytes, int] = {}
        """Per key under which a page was computed: its place then."""
        self.verbatim: dict[bytes, bytes] = {}
        """Per key under which a page was loaded without a rotation: the key under which it was computed."""
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
            ttl=self.ttl,
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
            self.verbatim.pop(keys[place], None)
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
        original = index.key(index.aliases.origin(row))
        # The device may have kept the page for longer than the store, which then saved it under its new key.
        original = self.verbatim.get(original, original)
        computed_at = self.originals[original]
        assert index.position[row] == computed_at * PAGE
        delta = (place - computed_at) * PAGE
        if not delta:
            self.verbatim[key] = original
        for k, v in self.buffers:
            assert torch.equal(self.page(v, place), content(original))
            assert torch.equal(self.page(k, place), rotated(content(original), delta))

    def settle(self) -> None:
        deadline = time.monotonic() + 20
        while self.store.flush(1.0) and time.monotonic() < deadline:
            pass

    def pass_time(self, seconds: float) -> None:
        self.now += seconds
        self.store.poll()

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


@pytest.fixture
def being_saved(talk: Conversations, monkeypatch: pytest.MonkeyPatch) -> Iterator[threading.Event]:
    """Eight pages of conversation "a" are on their way to host memory, until the event is set."""
    arrives, copier = threading.Event(), talk.store._transfers._copier
    save = copier.save

    def save_later(pages: Sequence[int], slots: Sequence[int]) -> None:
        arrives.wait(20)
        save(pages, slots)

    monkeypatch.setattr(copier, "save", save_later)
    keys = keys_of("a", 8, 0)
    for place, key in enumerate(keys):
        talk.originals[key] = place
        talk._write(place, key, 0)
    talk.store.save(PageRun(None, 0, keys, torch.arange(len(keys) * PAGE)))
    yield arrives
    arrives.set()
    talk.store._saves.wait()
    talk.store.poll()
    talk.store.end_pass()


def next_turn(talk: Conversations, request: str) -> Chain:
    chain = Chain(keys_of("a", 9, 3))
    talk.store.alias(chain, sources("a", 9, 3))
    talk.store.await_saves(request, chain.keys)
    talk.store.arrive(request, chain)
    return chain


def test_a_truncated_prompt_waits_for_pages_that_are_being_saved(
    talk: Conversations, being_saved: threading.Event
) -> None:
    chain = next_turn(talk, "next")
    talk.store.poll()
    assert not talk.store.is_ready("next")
    being_saved.set()
    talk.store._saves.wait()
    talk.store.poll()
    assert talk.store.is_ready("next")
    assert talk.load("next", chain.keys, 0) == 5


def test_it_waits_no_longer_than_they_take_to_compute(talk: Conversations, being_saved: threading.Event) -> None:
    chain = next_turn(talk, "next")
    assert not talk.store.is_ready("next")
    talk.now += 5 * 60.0
    assert talk.store.is_ready("next")
    assert talk.store.reserve("next", chain) == 0


def test_one_that_left_waits_for_nothing(talk: Conversations, being_saved: threading.Event) -> None:
    next_turn(talk, "next")
    talk.store.leave("next")
    assert talk.store.is_ready("next")


def test_fifty_truncations_in_a_row(talk: Conversations) -> None:
    """Each page is loaded as its original, turned once: `check` compares to the bit."""
    pages = WINDOW
    talk.turn("a", pages)
    for _ in range(50):
        talk.settle()
        pages += STEP
        assert talk.turn("a", pages) == WINDOW - STEP
    assert talk.store.counters()["host_pages_used"] <= HOST_PAGES


def test_the_error_stays_flat_over_fifty_truncations() -> None:
    """A page of bfloat16 that moves fifty times is as close to fresh keys in the end as after the first move."""
    rotation = Rotation(tuple(1e4 ** (-i / 64) for i in range(0, 64, 2)))
    window, chance = 60, torch.Generator().manual_seed(0)
    unrotated = torch.randn(window * PAGE, 1, 64, generator=chance, dtype=torch.float64)
    base = torch.arange(window * PAGE) + 100_000

    def fresh(drop: int) -> torch.Tensor:
        """The keys of the pages that are left, rotated where they are after `drop` pages have gone."""
        positions = (base - drop * PAGE)[drop * PAGE :].tolist()
        return rotate(unrotated[drop * PAGE :].float(), delta_table(rotation, positions), rotation).bfloat16()

    pool = DevicePool([[torch.zeros(window * PAGE, 1, 64, dtype=torch.bfloat16) for _ in "kv"]], PAGE)
    store = CachedAttentionStore(pool, window * pool.layout.stride, rotations=[rotation])
    keys, whole = pool.buffers[0][0], keys_of("a", window, 0)
    keys[:] = chained = fresh(0)
    store.save(PageRun(None, 0, whole, torch.arange(window * PAGE)))
    store._saves.wait()
    store.poll()
    step = delta_table(rotation, [-PAGE])
    errors, drifted = [], []
    for drop in range(1, 51):
        moved = Chain([sha256(key + bytes([drop])).digest() for key in whole[drop:]])
        store.alias(moved, [whole[drop:]])
        pages = store.reserve("next", moved)
        assert pages == window - drop
        assert store.queue_load("next", moved.keys, torch.arange(pages * PAGE))
        store.start_load(drop)
        assert store.finish_load(drop)
        store.end_pass()
        chained = rotate(chained[PAGE:], step, rotation)
        expected = fresh(drop).float()
        errors.append(_error(keys[: pages * PAGE], expected))
        drifted.append(_error(chained, expected))
    store.close()
    assert errors[-1] < 1.1 * errors[0]
    assert max(errors) < 1.2 * errors[0]
    assert drifted[-1] > 3 * drifted[0], "the test notices keys that were rotated again and again"


def _error(keys: torch.Tensor, expected: torch.Tensor) -> float:
    """Relative L2."""
    return ((keys.float() - expected).norm() / expected.norm()).item()


def test_a_restart_knows_what_was_kept(talk: Conversations) -> None:
    talk.turn("a", 8)
    talk.turn("a", 11)
    talk.restart()
    assert talk.turn("a", 11) == 8
    talk.restart()
    assert talk.turn("a", 13) == 13 - 6 - 2


def test_pages_live_as_long_as_one_of_their_names_is_used(tmp_path: Path) -> None:
    talk = Conversations(tmp_path, ttl=1000.0)
    talk.turn("a", 8)
    talk.settle()
    talk.pass_time(600)
    assert talk.turn("a", 9) == 5
    talk.settle()
    talk.pass_time(600)
    assert talk.store.restorable_pages(Chain(keys_of("a", 8, 0))) == 0, "nobody used them under these names"
    assert talk.turn("a", 9) == 6
    talk.pass_time(1100)
    assert talk.store.restorable_pages(Chain(keys_of("a", 9, 3))) == 0
    assert talk.store.counters()["host_pages_used"] == talk.store.counters()["disk_pages_used"] == 0
    talk.store.check_invariants()
    talk.store.close()


def test_a_new_name_is_as_old_as_the_page(tmp_path: Path) -> None:
    """What is not loadable yet is not marked as used, and must not expire for that."""
    talk = Conversations(tmp_path, ttl=1000.0)
    talk.turn("a", 8)
    chain = Chain(keys_of("a", 9, 3))
    talk.store.alias(chain, sources("a", 9, 3))
    talk.store.poll()
    assert talk.store.restorable_pages(chain) == 5
    talk.store.close()


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


def test_a_rotated_copy_is_known_as_one_while_its_request_runs() -> None:
    """The device does not show it to others before the request's forward has ended."""
    pages = Hierarchy(HostSlots(8), has_disk=False)
    aliases = Aliases(pages, PAGE, DEVICE_PAGES)
    for request in ("a", "b"):
        aliases.loaded_rotated(request, [b"page"])
    for request in ("a", "b"):
        aliases.left_device([b"page"])
        assert aliases.is_rotated(b"page")
        aliases.ended(request)
    assert aliases.is_rotated(b"page"), "it is in the tree"
    aliases.left_device([b"page"])
    assert not aliases.is_rotated(b"page")


def test_without_rotations_nothing_is_shared(tmp_path: Path) -> None:
    talk = Conversations(tmp_path)
    talk.store.close()
    pool = talk.pool
    talk.store = CachedAttentionStore(pool, HOST_PAGES * pool.layout.stride)
    talk.turn("a", 8)
    assert talk.turn("a", 9) == 0
    talk.store.close()


class Names:
    """A hierarchy of host memory alone, with pages that have one another's bytes."""

    def __init__(self) -> None:
        self.pages = Hierarchy(HostSlots(8), has_disk=False)
        self.pages.is_closed = False  # What comes before these pages does not matter here.
        self.index = self.pages.index
        self.aliases = Aliases(self.pages, page_size=20, device_pages=8)

    def save(self, key: bytes, place: int) -> int:
        row = admission.admit(self.pages, key, None, place)
        assert row is not None
        self.pages.land(row, clean=True)
        self.pages.unpin(row)
        return row

    def slots(self, *keys: bytes) -> list[int]:
        return [self.pages.in_host.slot[self.index.find(key)] for key in keys]


def test_a_page_that_left_gets_its_own_bytes_back_from_its_other_name() -> None:
    """A conversation was truncated twice, went back to a shorter prompt, and grew again."""
    names = Names()
    names.save(b"once", 40)
    assert names.aliases.alias(b"twice", None, 20, b"once")
    names.pages.leave_host(names.index.find(b"once"))
    names.save(b"whole", 60)
    assert names.aliases.alias(b"once", None, 40, b"whole")
    once, twice, whole = names.slots(b"once", b"twice", b"whole")
    assert once == twice != whole
    assert [names.index.aliases.delta(names.index.find(key)) for key in (b"once", b"twice")] == [0, -20]
    names.pages.check_invariants()
    for key in (b"twice", b"once", b"whole"):
        names.pages.leave_host(names.index.find(key))
    assert names.pages.host.free_slots == names.pages.host.capacity


def test_names_without_bytes_are_forgotten_when_their_page_gets_others() -> None:
    names = Names()
    once = names.save(b"once", 40)
    assert names.aliases.alias(b"twice", None, 20, b"once")
    twice = names.index.find(b"twice")
    names.pages.pin(twice)  # A conversation that goes on from it.
    for row in (twice, once):
        names.pages.leave_host(row)
    names.save(b"whole", 60)
    assert names.aliases.alias(b"once", None, 40, b"whole")
    assert twice not in names.pages.in_host
    assert names.index.aliases.origin(twice) == twice
    assert names.index.aliases.delta(names.index.find(b"once")) == -20
    names.pages.check_invariants()
    assert names.aliases.alias(b"twice", None, 20, b"whole")
    assert names.index.aliases.delta(twice) == -40
    names.pages.unpin(twice)
    names.pages.check_invariants()


class Overflowing(RuleBasedStateMachine):
    """Conversations at random, with evictions, expiry, restarts and pages that stay on the device."""

    @initialize()
    def start(self) -> None:
        self.directory = Path(tempfile.mkdtemp())
        self.talk = Conversations(self.directory, ttl=LIFE)
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

    @rule(share=st.sampled_from([0.3, 0.7, 1.1]))
    def pass_time(self, share: float) -> None:
        self.talk.pass_time(share * LIFE)

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
