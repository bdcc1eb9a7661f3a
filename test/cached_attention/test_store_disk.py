"""The store over host memory and disk: random histories against a model, restarts included."""

from __future__ import annotations

import shutil
import tempfile
import time
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
from cached_attention.migration.fetch import Fetch
from cached_attention.stats import Direction, Reason
from cached_attention.store import CachedAttentionStore
from cached_attention.tiers.disk import DiskTier
from cached_attention.uses import USE_NOTED

PAGE = 2
HOST_PAGES = 5
DEVICE_PAGES = 12
PROMPTS = ["aaaaaa", "aaabbb", "aacccc", "ddd", "ddeeeeee", "ffffffff"]
CAPACITY = 4 << 20


def keys_of(prompt: str) -> list[bytes]:
    return [sha256(prompt[: i + 1].encode()).digest() for i in range(len(prompt))]


def content(key: bytes) -> torch.Tensor:
    generator = torch.Generator().manual_seed(int.from_bytes(key[:4]))
    return torch.rand(PAGE, 1, 4, generator=generator)


class Conversations:
    """A device pool, a store with both tiers, and prompts whose pages have a content by their key."""

    def __init__(
        self,
        directory: Path,
        ttl: float | None = None,
        capacity: int = CAPACITY,
        queued_write_bytes: int = 1 << 30,
        min_uses: int = 1,
    ) -> None:
        self.directory = directory
        self.buffers = [[torch.zeros(DEVICE_PAGES * PAGE, 1, 4) for _ in "kv"] for _ in range(2)]
        self.pool = DevicePool(self.buffers, PAGE)
        self.now = 1000.0
        self.batch = 0
        self.ttl = ttl
        self.capacity = capacity
        self.queued_write_bytes = queued_write_bytes
        self.min_uses = min_uses
        self.open()

    def open(self) -> None:
        size = HOST_PAGES * self.pool.layout.stride
        self.store = CachedAttentionStore(
            self.pool, size, self.open_disk(), min_uses=self.min_uses, ttl=self.ttl, clock=self.tick
        )
        for _ in range(20):
            self.store.prefill_took(PAGE, 60.0)  # So that a fetch is always worth waiting for.

    def open_disk(self) -> DiskTier:
        layout = self.pool.layout.component_bytes
        fingerprint = Fingerprint("m", "w", "float32", PAGE, layout, {"tp_rank": 0}, {})
        return DiskTier(self.directory, fingerprint, self.capacity, queued_write_bytes=self.queued_write_bytes)

    def tick(self) -> float:
        self.now += 1
        return self.now

    def save(self, prompt: str) -> bool:
        keys = keys_of(prompt)
        for page, key in enumerate(keys):
            for layer in self.buffers:
                for buffer in layer:
                    buffer[page * PAGE : (page + 1) * PAGE] = content(key)
        self.store.save(PageRun(None, 0, keys, torch.arange(len(keys) * PAGE)))
        self.store._saves.wait()
        assert self.store.poll() == 1
        return self.store.pop_save()

    def settle(self) -> None:
        """Until nothing moves between host and disk."""
        deadline = time.monotonic() + 20
        while self.store.flush(1.0) and time.monotonic() < deadline:
            if not self.store.disk.healthy or not self.store.disk.free_slots:
                break

    def fetch(self, prompt: str) -> int:
        chain = Chain(keys_of(prompt))
        self.store.arrive(prompt, chain)
        deadline = time.monotonic() + 20
        while not self.store.is_ready(prompt):
            assert time.monotonic() < deadline, "a fetch hangs"
            time.sleep(0.001)
            self.store.poll()
        return self.store.loadable_pages(chain)

    def load(self, prompt: str, on_device: int = 0) -> int:
        """Fetch, reserve and load what can be beyond the pages `on_device`; every byte is checked."""
        self.fetch(prompt)
        pages = self.store.reserve(prompt, Chain(keys_of(prompt)))
        if not pages:
            assert not self.store.cancel_load(prompt)
            return 0
        keys = keys_of(prompt)[:pages]
        for layer in self.buffers:
            for buffer in layer:
                buffer[on_device * PAGE :].zero_()
        assert self.store.queue_load(prompt, keys[on_device:], torch.arange(on_device * PAGE, pages * PAGE))
        self.batch += 1
        self.store.start_load(self.batch)
        assert self.store.finish_load(self.batch)
        self.store.end_pass()
        for page, key in enumerate(keys):
            for layer in self.buffers:
                for buffer in layer:
                    assert torch.equal(buffer[page * PAGE : (page + 1) * PAGE], content(key))
        return pages

    def restart(self) -> None:
        self.settle()
        self.store.close()
        self.open()


def test_with_min_uses_a_conversation_goes_to_disk_when_it_goes_on(tmp_path: Path) -> None:
    talk = Conversations(tmp_path, min_uses=2)
    talk.save("aaaa")
    talk.settle()
    assert talk.store.counters()["disk_pages_used"] == 0
    assert talk.load("aaaa", on_device=2) == 4
    talk.settle()
    assert talk.store.counters()["disk_pages_used"] == 4, "of what the device still has no less than of the rest"
    talk.restart()
    assert talk.load("aaaa") == 4
    talk.store.check_invariants()
    talk.store.close()


def test_what_leaves_host_memory_comes_back_from_disk(tmp_path: Path) -> None:
    talk = Conversations(tmp_path)
    for prompt in PROMPTS:
        talk.save(prompt[:4])
        talk.settle()
    assert talk.store.counters()["disk_pages_used"] > HOST_PAGES
    for prompt in PROMPTS:
        assert talk.load(prompt[:4]) == len(prompt[:4])
    assert talk.store.counters()["fetched"] >= 10
    talk.store.check_invariants()
    talk.store.close()


def test_a_restart_keeps_conversations(tmp_path: Path) -> None:
    talk = Conversations(tmp_path)
    talk.save("ddee")
    talk.settle()
    talk.save("aaaa")
    talk.restart()
    assert talk.store.resident_pages == 0
    assert talk.load("ddee") == 4
    assert talk.load("aaaa") == 4
    talk.store.check_invariants()
    talk.store.close()


def test_use_is_remembered_over_a_restart(tmp_path: Path) -> None:
    talk = Conversations(tmp_path)
    talk.save("dd")
    talk.save("aa")
    talk.settle()
    assert talk.load("dd") == 2
    talk.restart()
    index = talk.store._index
    used, unused = (index.find(keys_of(prompt)[0]) for prompt in ("dd", "aa"))
    assert (index.uses[used], index.uses[unused]) == (2, 1)
    assert index.last_use[used] > index.last_use[unused]
    talk.store.close()


def test_use_on_the_device_alone_keeps_the_whole_chain_young_on_disk(tmp_path: Path) -> None:
    talk = Conversations(tmp_path)
    talk.save("ddeeee")
    talk.settle()
    for _ in range(5):
        talk.now += 100
        talk.store.reserve("r", Chain(keys_of("ddeeee")))
        talk.store.end_pass()
    talk.restart()
    rows = [talk.store._index.find(key) for key in keys_of("ddeeee")]
    assert min(talk.store._index.last_use[row] for row in rows) > 1500 - USE_NOTED
    talk.store.close()


def test_a_detached_disk_keeps_its_pages_and_gets_no_more(tmp_path: Path) -> None:
    talk = Conversations(tmp_path)
    talk.save("aaaa")
    talk.settle()
    talk.save("ffff")
    talk.settle()
    talk.store.arrive("waiting", Chain(keys_of("aaaa")))
    talk.store.detach_disk()
    talk.store.check_invariants()
    assert talk.store.is_ready("waiting")
    in_host = {prompt: talk.load(prompt) for prompt in ("aaaa", "ffff")}
    assert 0 < sum(in_host.values()) <= HOST_PAGES
    talk.save("dd")
    assert talk.store.flush(1.0) == 0
    talk.store.replace_disk(talk.open_disk)
    assert [talk.load(prompt) for prompt in ("aaaa", "ffff", "dd")] == [4, 4, 0]
    talk.store.check_invariants()
    talk.store.close()


def test_a_disk_that_is_opened_later_gets_pages_that_can_be_read_back(tmp_path: Path) -> None:
    """As after a start with a full file system."""
    talk = Conversations(tmp_path)
    talk.store.close()
    talk.store = CachedAttentionStore(talk.pool, HOST_PAGES * talk.pool.layout.stride, clock=talk.tick)
    talk.save("dd")
    talk.store.replace_disk(talk.open_disk)
    talk.save("aaaa")
    talk.restart()
    assert talk.load("aaaa") == 4
    assert talk.store.counters()["disk_damaged"] == 0
    assert talk.load("dd") == 0
    talk.store.close()


def test_a_conversation_lies_on_disk_as_it_is_read(tmp_path: Path) -> None:
    """So that few large reads bring it back, although its tail was due first."""
    talk = Conversations(tmp_path)
    talk.save("abcd")
    talk.settle()
    slots = [talk.store._pages.on_disk.slot[talk.store._index.find(key)] for key in keys_of("abcd")]
    assert slots == list(range(slots[0], slots[0] + 4))
    talk.store.close()


def test_writes_wait_for_reads_until_the_reserve_is_short(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    talk = Conversations(tmp_path)
    monkeypatch.setattr(Fetch, "is_reading", True)
    talk.save("dddd")
    assert talk.store.counters()["dirty"] == 4
    talk.save("a")
    talk.settle()
    assert 0 < talk.store.counters()["disk_pages_used"] <= HOST_PAGES
    talk.store.close()


def test_no_more_is_written_at_once_than_the_disk_takes(tmp_path: Path) -> None:
    talk = Conversations(tmp_path, queued_write_bytes=2 << 12)
    assert talk.store.disk.write_room == 2
    talk.save("aacccc"[:HOST_PAGES])
    talk.settle()
    assert talk.store.counters()["disk_pages_used"] == HOST_PAGES
    assert talk.store.disk.stats.declined == 0
    talk.store.close()


def test_a_full_disk_makes_room_for_what_is_warmer(tmp_path: Path) -> None:
    talk = Conversations(tmp_path, capacity=520 << 10)
    room = talk.store.disk.capacity_slots
    assert 8 < room < 60
    prompts = [f"{letter}{letter}{number}" for letter in "abcdefghij" for number in range(4)]
    deadline = time.monotonic() + 60
    for prompt in prompts:
        talk.save(prompt)
        while (counts := talk.store.counters())["dirty"] or talk.store._migration.to_disk.rows_in_flight:
            assert time.monotonic() < deadline, f"a page waits for room for ever: {counts}"
            talk.store.poll()
            time.sleep(0.002)
    assert talk.store.counters()["disk_pages_used"] <= room
    assert talk.load(prompts[-1]) == 3
    assert talk.load(prompts[0]) < 3
    talk.store.check_invariants()
    talk.store.close()


def test_what_is_not_used_expires_everywhere(tmp_path: Path) -> None:
    talk = Conversations(tmp_path, ttl=500)
    talk.save("dd")
    talk.settle()
    talk.now += 400
    talk.save("aa")
    talk.settle()
    talk.now += 200
    talk.store.poll()
    assert talk.load("dd") == 0
    assert talk.load("aa") == 2
    assert talk.store.counters()["expired"] == 4  # Two pages, in each tier.
    talk.store.check_invariants()
    talk.store.close()


def test_it_is_counted_what_moves_and_why_pages_leave(tmp_path: Path) -> None:
    talk = Conversations(tmp_path)
    stats = talk.store.stats
    for prompt in ("aaaa", "dddd"):
        talk.save(prompt)
        talk.settle()
    assert talk.load("aaaa") == 4
    moved = {place: flow.pages for place, flow in stats.flows.items()}
    fetched = moved[Direction.FETCH, "disk"]
    assert fetched == talk.store.counters()["fetched"] > 0
    assert moved == {
        (Direction.SAVE, "host"): 8,
        (Direction.DEMOTE, "disk"): 8,
        (Direction.FETCH, "disk"): fetched,
        (Direction.LOAD, "host"): 4,
    }
    assert stats.gone["host", Reason.ROOM] == talk.store.counters()["evicted"] == 8 + fetched - HOST_PAGES
    talk.store.drop(Chain(keys_of("aaaa")))
    assert stats.gone["host", Reason.HINT] == stats.gone["disk", Reason.HINT] == 4
    before = talk.store.counters()
    talk.store.reset()
    assert stats.gone["host", Reason.FLUSH] == before["host_pages_used"]
    assert stats.gone["disk", Reason.FLUSH] == before["disk_pages_used"] == 4
    after = talk.store.counters()
    assert (after["fetched"], after["saved"], after["evicted"]) == (fetched, 8, before["evicted"])
    talk.store.close()


def test_a_damaged_record_is_counted(tmp_path: Path) -> None:
    talk = Conversations(tmp_path)
    talk.save("aa")
    talk.restart()
    for file in talk.store.disk.path.glob("*"):
        if file.name.startswith("pages"):
            file.write_bytes(b"x" * file.stat().st_size)
    assert talk.load("aa") == 0
    assert talk.store.counters()["disk_damaged"] == 2
    assert talk.store.stats.gone["disk", Reason.DAMAGE] == 2
    assert talk.store.disk.io_errors == 0
    talk.store.close()


class Histories(RuleBasedStateMachine):
    ttl: float | None = None

    @initialize()
    def start(self) -> None:
        self.directory = Path(tempfile.mkdtemp(prefix="store-model-"))
        self.talk = Conversations(self.directory, self.ttl)

    def teardown(self) -> None:
        if hasattr(self, "talk"):
            self.talk.store.close()
            shutil.rmtree(self.directory)

    @rule(prompt=st.sampled_from(PROMPTS), length=st.integers(1, 8))
    def save(self, prompt: str, length: int) -> None:
        if self.talk.save(prompt[:length]):
            assert self.talk.store.restorable_pages(Chain(keys_of(prompt[:length]))) == len(prompt[:length])

    @rule()
    def settle(self) -> None:
        self.talk.settle()

    @rule(prompt=st.sampled_from(PROMPTS))
    def prefetch(self, prompt: str) -> None:
        self.talk.store.arrive(prompt, Chain(keys_of(prompt)))

    @rule(prompt=st.sampled_from(PROMPTS))
    def leave(self, prompt: str) -> None:
        self.talk.store.cancel_load(prompt)

    @rule(prompt=st.sampled_from(PROMPTS))
    def load(self, prompt: str) -> None:
        restorable = self.talk.store.restorable_pages(Chain(keys_of(prompt)))
        assert self.talk.load(prompt) <= restorable

    @precondition(lambda self: hasattr(self, "talk"))
    @rule()
    def restart(self) -> None:
        held = {prompt: self.talk.store.restorable_pages(Chain(keys_of(prompt))) for prompt in PROMPTS}
        self.talk.restart()
        for prompt, pages in held.items():
            found = self.talk.store.restorable_pages(Chain(keys_of(prompt)))
            assert found == pages or (self.ttl and found < pages)

    @rule()
    def update_weights(self) -> None:
        """Away from the disk's fingerprint and back to it."""
        self.talk.settle()
        on_disk = self.talk.store.counters()["disk_pages_used"]
        self.talk.store.detach_disk()
        self.talk.store.check_invariants()
        self.talk.save("detached")
        self.talk.store.replace_disk(self.talk.open_disk)
        assert self.talk.store.counters()["disk_pages_used"] == on_disk

    @rule()
    def reset(self) -> None:
        self.talk.store.reset()
        assert all(not self.talk.store.restorable_pages(Chain(keys_of(prompt))) for prompt in PROMPTS)

    @invariant()
    def whole(self) -> None:
        if hasattr(self, "talk"):
            self.talk.store.check_invariants()
            assert self.talk.store.resident_pages <= HOST_PAGES


TestHistories = Histories.TestCase
TestHistories.settings = settings(max_examples=25, stateful_step_count=25, deadline=None)


class ExpiringHistories(Histories):
    ttl = 2000.0

    @rule(seconds=st.integers(1, 2500))
    def wait(self, seconds: int) -> None:
        self.talk.settle()
        self.talk.store.reorder([])  # What is wanted does not expire, nor what is just being read.
        while self.talk.store.pins:
            time.sleep(0.001)
            self.talk.store.poll()
        self.talk.now += seconds
        self.talk.store.poll()
        if seconds > self.ttl:
            assert all(not self.talk.load(prompt) for prompt in PROMPTS)


TestExpiringHistories = ExpiringHistories.TestCase
TestExpiringHistories.settings = settings(max_examples=25, stateful_step_count=25, deadline=None)


def test_a_chat_with_short_pauses_outlives_its_time_to_live_whole(tmp_path: Path) -> None:
    talk = Conversations(tmp_path, ttl=600.0)
    prompt = "a"
    for _ in range(9):
        talk.save(prompt)
        for _ in range(7):
            talk.now += 20
            talk.store.arrive("turn", Chain(keys_of(prompt)))
            talk.store.reserve("turn", Chain(keys_of(prompt)))
            talk.store.end_pass()
            talk.store.leave("turn")
        prompt += "a"
        prompt = prompt[: HOST_PAGES - 1]
    index = talk.store._index
    ages = [talk.now - index.last_use[index.find(key)] for key in keys_of(prompt)]
    assert max(ages) <= 2 * USE_NOTED, "the head of a conversation in use ages"
    talk.restart()
    assert talk.load(prompt) == len(prompt)
    talk.store.close()
