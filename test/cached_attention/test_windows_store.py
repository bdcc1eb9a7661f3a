"""KV and layers with sliding windows in two stores that act as one: a prefix needs the windows at its end."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Iterator
from hashlib import sha256
from itertools import count
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cached_attention.chain import Chain, PageRun
from cached_attention.fingerprint import Fingerprint
from cached_attention.hybrid_store import HybridStore
from cached_attention.layout import DevicePool
from cached_attention.policy.waiting import CEILING
from cached_attention.tiers.disk import DiskTier
from cached_attention.trailing_store import TrailingStore

PAGE = 2
"""Tokens."""
SPAN, CHAIN = 2, 3
"""Pages of a window, and of a chain of them."""
PAGES, WINDOWS = 12, 14
"""Of the device."""
HOST_PAGES, HOST_WINDOWS = 10, 7
PROMPTS = ["aaaaaa", "aaabbbbb", "aacccc", "dddd", "ffffffff"]


def keys_of(prompt: str) -> list[bytes]:
    return [sha256(prompt[: end + 1].encode()).digest() for end in range(len(prompt))]


def content(key: bytes, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(int.from_bytes(key[:4]) + seed)
    return torch.rand(PAGE, 1, 4, generator=generator)


class Windowed:
    """A model with one layer of full attention, and two with windows."""

    def __init__(self, directory: Path, io: Any) -> None:
        self.directory = directory
        self.kv = [torch.zeros(PAGES * PAGE, 1, 4) for _ in "kv"]
        self.windows = [torch.zeros(WINDOWS * PAGE, 1, 4) for _ in range(4)]
        layers = [self.windows[:2], self.windows[2:]]
        self.kv_pool, self.window_pool = DevicePool([self.kv], PAGE), DevicePool(layers, PAGE)
        self.io = io
        self.batches = count()
        self.open()

    def open(self) -> None:
        size = HOST_WINDOWS * self.window_pool.layout.stride
        windows = TrailingStore(self.window_pool, size, self.disk("windows", self.window_pool), chain_pages=CHAIN)
        kv_size = HOST_PAGES * self.kv_pool.layout.stride
        disk = self.disk("kv", self.kv_pool)
        self.store = HybridStore(self.kv_pool, kv_size, disk, trailing=windows, span=SPAN)
        for _ in range(20):
            self.store.prefill_took(PAGE, 60.0)  # So that a fetch is always worth waiting for.

    def disk(self, name: str, pool: DevicePool) -> DiskTier:
        layout = pool.layout
        fingerprint = Fingerprint("m", "w", "float32", layout.page_size, layout.component_bytes, {}, {})
        return DiskTier(self.directory / name, fingerprint, 4 << 20, io=self.io)

    def save(self, prompt: str, windows: int = 100) -> bool:
        """`windows`: of how many of its last pages they are still there."""
        keys = keys_of(prompt)
        for page, key in enumerate(keys):
            tokens = slice(page * PAGE, (page + 1) * PAGE)
            for seed, buffer in enumerate(self.kv + self.windows):
                buffer[tokens] = content(key, seed)
        slots = torch.arange(len(keys) * PAGE)
        first = max(0, len(keys) - windows)
        parent = keys[first - 1] if first else None
        trailing = PageRun(parent, first, keys[first:], slots[first * PAGE :]) if windows else None
        self.store.save(PageRun(None, 0, keys, slots), trailing=trailing)
        self.store._saves.wait()
        self.store.trailing._saves.wait()
        assert self.store.poll() == 1
        return self.store.pop_save()

    def fetch(self, prompt: str, on_device: int = 0) -> Chain:
        chain = Chain(keys_of(prompt))
        self.store.arrive(prompt, chain, on_device=on_device)
        deadline = time.monotonic() + 20
        while not self.store.is_ready(prompt):
            assert time.monotonic() < deadline, "a fetch hangs"
            time.sleep(0.001)
            self.store.poll()
        return chain

    def load(self, prompt: str, on_device: int = 0) -> int:
        """Fetch and load as much of `prompt` as can be gone on from; every byte is checked."""
        chain = self.fetch(prompt, on_device)
        end = next(self.store.ends(chain, self.store.reserve(prompt, chain), on_device), 0)
        if end:
            self.store.reserve_tail(prompt, chain, end, on_device)
            for buffer in self.kv + self.windows:
                buffer.zero_()
            pages, tail = chain.keys[on_device:end], chain.keys[max(on_device, end - SPAN) : end]
            slots = torch.arange(len(pages) * PAGE)
            # The last slots of the device, so that none of them is where it was saved from.
            tail_slots = torch.arange(WINDOWS * PAGE)[-len(tail) * PAGE :]
            assert self.store.queue_load(prompt, pages, slots)
            assert self.store.queue_tail(prompt, tail, tail_slots)
            batch = next(self.batches)
            self.store.start_load(batch)
            self.store.start_tail_load(batch)
            assert self.store.finish_load(batch)
            self.check(self.kv, 0, pages, 0)
            self.check(self.windows, 2, tail, WINDOWS - len(tail))
        self.store.leave(prompt)
        self.store.end_pass()
        return end

    @staticmethod
    def check(buffers: list[torch.Tensor], seed: int, keys: list[bytes], first: int) -> None:
        for page, key in enumerate(keys, first):
            for number, buffer in enumerate(buffers, seed):
                assert buffer[page * PAGE : (page + 1) * PAGE].equal(content(key, number))

    def settle(self) -> None:
        deadline = time.monotonic() + 20
        while self.store.flush(1.0):
            assert time.monotonic() < deadline, "never at rest"

    def restart(self) -> None:
        self.settle()
        self.store.close()
        self.open()


@pytest.fixture
def windowed(tmp_path: Path, gated_reads: Any) -> Iterator[Windowed]:
    model = Windowed(tmp_path, gated_reads())
    yield model
    model.io.gate.set()
    model.store.check_invariants()
    model.store.close()


def test_a_prefix_can_be_gone_on_from_where_the_windows_before_it_are_kept(windowed: Windowed) -> None:
    assert windowed.save("aaaa")
    assert windowed.save("aaaaaaaa", windows=3)
    chain = Chain(keys_of("aaaaaaaa"))
    # Of page 5, the one after the fourth, there are none.
    assert list(windowed.store.ends(chain, 8)) == [8, 7, 4, 3, 2, 1]
    assert list(windowed.store.ends(chain, 6)) == [4, 3, 2, 1]
    assert list(windowed.store.ends(chain, 8, on_device=5)) == [8, 7, 6]
    assert list(windowed.store.ends(chain, 8, on_device=7)) == [8]
    assert list(windowed.store.ends(chain, 4, on_device=6)) == []
    assert windowed.load("aaaaaaaa") == 8
    assert windowed.load("aaaaaaab") == 7
    assert windowed.load("aaaaaabb") == 4
    assert windowed.load("aaaaaabb", on_device=5) == 6
    assert windowed.load("ab") == 1


def test_windows_are_kept_in_short_chains(windowed: Windowed) -> None:
    windowed.save("aaaaaaa")
    keys, chains = keys_of("aaaaaaa"), windowed.store.trailing.chains
    assert [len(chain.keys) for chain in chains(keys[1:])] == [2, 3, 1]
    assert [chain.keys for chain in chains(keys[4:6])] == [keys[4:6]]
    assert [chain.keys for chain in chains(keys[5:7])] == [keys[5:6], keys[6:7]]
    unknown = keys_of("x")
    assert [chain.keys for chain in chains([*unknown, *keys[:2], *unknown])] == [unknown, keys[:2], unknown]
    assert chains([]) == []


def test_windows_after_a_gap_are_kept_by_themselves(windowed: Windowed) -> None:
    windowed.save("aaaaaaaa", windows=1)
    windowed.save("aaaaaaa", windows=1)
    keys = keys_of("aaaaaaaa")
    chain = Chain(keys)
    assert list(windowed.store.ends(chain, 8)) == [8]
    assert [part.keys for part in windowed.store.trailing.chains(keys[6:])] == [keys[6:7], keys[7:8]]
    windowed.restart()
    assert windowed.load("aaaaaaaa") == 8


def test_both_parts_of_a_window_are_kept_until_they_are_loaded(windowed: Windowed) -> None:
    windowed.save("aaaa")
    windowed.settle()
    chain, trailing = Chain(keys_of("aaaa")), windowed.store.trailing
    assert windowed.store.arrive("request", chain) == 4
    windowed.store.reserve_tail("request", chain, 4)
    assert trailing.pins == 2
    windowed.save("ffffffff")
    assert trailing.is_loadable(chain.keys[2])
    assert trailing.is_loadable(chain.keys[3])
    windowed.store.end_pass()
    # And while the request waits: what it wants goes after all that nobody waits for.
    windowed.settle()
    windowed.save("ddd")
    assert trailing.is_loadable(chain.keys[2])
    assert trailing.is_loadable(chain.keys[3])
    assert sorted(trailing._pages.waiting.requests) == ["request 0", "request 1"]
    windowed.store.reorder(["request"])
    assert trailing._pages.waiting.requests == ["request 0", "request 1"]
    windowed.store.leave("request")
    assert not trailing._pages.waiting.requests


def test_what_the_windows_of_a_waiting_request_are_is_looked_up_again(windowed: Windowed) -> None:
    windowed.save("aaaa")
    windowed.settle()
    chain, trailing = Chain(keys_of("aaaa")), windowed.store.trailing
    assert windowed.store.arrive("request", chain) == 4
    trailing.leave("request 0")
    trailing.leave("request 1")
    assert trailing.drop(Chain(chain.keys[3:])) == 1
    assert windowed.store.arrive("request", chain) == 3
    assert trailing._pages.waiting.requests == ["request 0"]


def test_what_is_on_the_device_is_kept_where_there_is_no_more(windowed: Windowed) -> None:
    windowed.save("aaaa")
    trailing = windowed.store.trailing
    row = trailing._index.find(keys_of("aaaa")[-1])
    trailing._index.last_use[row] = 1.0
    assert windowed.store.arrive("request", Chain(keys_of("aaaab")), on_device=4) == 4
    assert trailing._index.last_use[row] > 1.0
    assert trailing._pages.waiting.requests == ["request 0", "request 1"]


def test_nothing_is_brought_up_for_a_request_that_the_device_has_all_of(windowed: Windowed) -> None:
    windowed.save("aaaa")
    windowed.restart()
    windowed.io.gate.clear()
    assert windowed.store.arrive("on the device", Chain(keys_of("aaaa")), on_device=4) == 4
    windowed.store.poll()
    assert windowed.store.is_ready("on the device")
    assert windowed.store.arrive("in part", Chain(keys_of("aaaa")), on_device=3) == 4
    windowed.store.poll()
    assert not windowed.store.is_ready("in part")


def test_windows_are_not_waited_for_where_the_pages_were_given_up(windowed: Windowed) -> None:
    windowed.save("aaaa")
    windowed.restart()
    windowed.io.gate.clear()
    windowed.store._decision.computing.__init__(latency=0.0, rate=1e12)
    windowed.store.arrive("request", Chain(keys_of("aaaa")))
    windowed.store.poll()
    assert not windowed.store.trailing.is_ready("request 0")
    deadline = time.monotonic() + CEILING / 2
    while not windowed.store.is_ready("request"):
        assert time.monotonic() < deadline
        windowed.store.poll()  # Each pass decides anew.
    assert not windowed.store.trailing.is_ready("request 0")


def test_requests_may_have_any_names(windowed: Windowed) -> None:
    """As that of another with the number of a chain."""
    windowed.save("aaaa")
    windowed.settle()
    chain, trailing = Chain(keys_of("aaaa")), windowed.store.trailing
    for request in ("a", "a 0", "a 1", "a 0 1"):
        windowed.store.arrive(request, chain)
        windowed.store.reserve(request, chain)
        windowed.store.reserve_tail(request, chain, 4)
        assert windowed.store.queue_load(request, chain.keys, torch.arange(4 * PAGE))
        assert windowed.store.queue_tail(request, chain.keys[2:], torch.arange(2 * PAGE))
    windowed.store.end_pass()
    assert trailing.pins == 8
    for left, request in ((6, "a"), (4, "a 1"), (2, "a 0"), (0, "a 0 1")):
        assert windowed.store.cancel_load(request)
        assert trailing.pins == left


def test_a_window_whose_chain_was_lost_in_a_crash_is_of_use(windowed: Windowed) -> None:
    windowed.save("aaaaa")
    windowed.settle()
    windowed.store.close()
    windowed.open()
    trailing = windowed.store.trailing
    before = trailing._index.find(keys_of("aaaaa")[3])
    disk = trailing.disk
    assert disk is not None
    # As if it had not been written.
    disk.remove(trailing._pages.leave_disk(before))
    windowed.restart()
    chain = Chain(keys_of("aaaaa"))
    assert list(windowed.store.held_ends(chain, 5)) == [3, 2, 1]
    assert list(windowed.store.held_ends(chain, 5, on_device=4)) == [5]
    windowed.fetch("aaaaa", on_device=4)
    windowed.store.check_invariants()
    assert windowed.load("aaaaa", on_device=4) == 5


def test_a_window_that_cannot_be_loaded_whole_is_not_loaded(windowed: Windowed) -> None:
    windowed.save("aaaa")
    windowed.settle()
    chain = Chain(keys_of("aaaa"))
    windowed.store.reserve("aaaa", chain)
    windowed.store.reserve_tail("aaaa", chain, 4)
    assert windowed.store.queue_load("aaaa", chain.keys, torch.arange(4 * PAGE))
    windowed.store.end_pass()
    assert windowed.store.trailing.drop(Chain(chain.keys[3:])) == 1
    assert not windowed.store.queue_tail("aaaa", chain.keys[2:], torch.arange(2 * PAGE))
    assert windowed.store.cancel_load("aaaa")
    assert not windowed.store.pins
    assert not windowed.store.trailing.pins


def test_a_cancelled_load_holds_nothing(windowed: Windowed) -> None:
    windowed.save("aaaa")
    windowed.settle()
    chain = windowed.fetch("aaaa")
    windowed.store.reserve("aaaa", chain)
    windowed.store.reserve_tail("aaaa", chain, 4)
    assert windowed.store.queue_load("aaaa", chain.keys, torch.arange(4 * PAGE))
    assert windowed.store.queue_tail("aaaa", chain.keys[2:], torch.arange(2 * PAGE))
    windowed.store.end_pass()
    assert windowed.store.trailing.pins == 2
    assert windowed.store.cancel_load("aaaa")
    assert not windowed.store.pins
    assert not windowed.store.trailing.pins


def test_a_dropped_conversation_takes_its_windows_along(windowed: Windowed) -> None:
    windowed.save("aaaaaaaa", windows=3)
    windowed.save("aaaabb", windows=2)
    windowed.settle()
    assert windowed.store.drop(Chain(keys_of("aaaaaaaa"))) == 4
    trailing = windowed.store.trailing
    assert not any(map(trailing.holds, keys_of("aaaaaaaa")[4:]))
    assert list(windowed.store.ends(Chain(keys_of("aaaabb")), 6)) == [6]
    assert windowed.store.drop(Chain(keys_of("aaaabb"))) == 6
    assert not any(map(trailing.holds, keys_of("aaaabb")))


saved = st.tuples(st.just("save"), st.sampled_from(PROMPTS), st.integers(1, 8), st.integers(0, 8))
loaded = st.tuples(st.just("load"), st.sampled_from(PROMPTS), st.just(8), st.integers(0, 6))
dropped = st.tuples(st.just("drop"), st.sampled_from(PROMPTS), st.just(8), st.just(0))
restarted = st.tuples(st.just("restart"), st.just(""), st.just(0), st.just(0))


@settings(max_examples=60, deadline=None)
@given(history=st.lists(st.one_of(saved, saved, loaded, loaded, dropped, restarted), max_size=25))
def test_whatever_happens_pages_and_windows_are_those_that_were_saved(
    gated_reads: Any, history: list[tuple[str, str, int, int]]
) -> None:
    with tempfile.TemporaryDirectory() as directory:
        windowed = Windowed(Path(directory), gated_reads())
        kept: set[str] = set()
        for what, prompt, length, pages in history:
            if what == "save":
                windowed.save(prompt[:length], pages)
                part = prompt[:length]
                kept |= {part[: end + 1] for end in range(max(0, len(part) - pages), len(part))}
            elif what == "load":
                end = windowed.load(prompt, min(pages, len(prompt)))
                assert {prompt[:page] for page in range(max(pages, end - SPAN) + 1, end + 1)} <= kept
            elif what == "drop":
                windowed.store.drop(Chain(keys_of(prompt)))
            else:
                windowed.restart()
            windowed.store.check_invariants()
        windowed.settle()
        windowed.store.close()
