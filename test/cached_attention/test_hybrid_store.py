"""KV and states in two stores that act as one: what can be gone on from, and random histories with restarts."""

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
PAGES, SLOTS = 12, 6
"""Of the device: pages of KV, and states."""
HOST_PAGES, HOST_STATES = 8, 3
PROMPTS = ["aaaaaa", "aaabbb", "aacccc", "dddd", "ffffffff"]


def keys_of(prompt: str) -> list[bytes]:
    return [sha256(prompt[: end + 1].encode()).digest() for end in range(len(prompt))]


def content(key: bytes, *shape: int) -> torch.Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(int.from_bytes(key[:4])))


class Hybrid:
    """A model with one layer of attention, and one that keeps a convolution and a recurrence."""

    def __init__(self, directory: Path, io: Any) -> None:
        self.directory = directory
        self.kv = [torch.zeros(PAGES * PAGE, 1, 4) for _ in "kv"]
        self.states = [torch.zeros(SLOTS, 3, 5), torch.zeros(SLOTS, 2, 4, 4)]
        self.kv_pool, self.state_pool = DevicePool([self.kv], PAGE), DevicePool([self.states], 1)
        self.io = io
        self.batches = count()
        self.open()

    def open(self) -> None:
        size = HOST_STATES * self.state_pool.layout.stride
        states = TrailingStore(self.state_pool, size, self.disk("states", self.state_pool), chain_pages=1)
        kv_size = HOST_PAGES * self.kv_pool.layout.stride
        self.store = HybridStore(self.kv_pool, kv_size, self.disk("kv", self.kv_pool), trailing=states)
        for _ in range(20):
            self.store.prefill_took(PAGE, 60.0)  # So that a fetch is always worth waiting for.

    def disk(self, name: str, pool: DevicePool) -> DiskTier:
        layout = pool.layout
        fingerprint = Fingerprint("m", "w", "float32", layout.page_size, layout.component_bytes, {}, {})
        return DiskTier(self.directory / name, fingerprint, 4 << 20, io=self.io)

    def start_save(self, prompt: str, has_state: bool = True) -> None:
        """Slot 1 has the state at the end of the prompt."""
        keys = keys_of(prompt)
        for page, key in enumerate(keys):
            for buffer in self.kv:
                buffer[page * PAGE : (page + 1) * PAGE] = content(key, PAGE, 1, 4)
        for buffer in self.states:
            buffer[1] = content(keys[-1], *buffer.shape[1:])
        state = PageRun(None, 0, keys[-1:], torch.tensor([1])) if has_state else None
        self.store.save(PageRun(None, 0, keys, torch.arange(len(keys) * PAGE)), trailing=state)

    def save(self, prompt: str, has_state: bool = True) -> bool:
        self.start_save(prompt, has_state)
        self.store._saves.wait()
        self.store.trailing._saves.wait()
        assert self.store.poll() == 1
        return self.store.pop_save()

    def fetch(self, prompt: str) -> Chain:
        chain = Chain(keys_of(prompt))
        self.store.arrive(prompt, chain)
        deadline = time.monotonic() + 20
        while not self.store.is_ready(prompt):
            assert time.monotonic() < deadline, "a fetch hangs"
            time.sleep(0.001)
            self.store.poll()
        return chain

    def load(self, prompt: str) -> int:
        """Fetch and load as much of `prompt` as there is a state for; every byte is checked."""
        chain = self.fetch(prompt)
        end = next(self.store.ends(chain, self.store.reserve(prompt, chain)), 0)
        if end:
            key = chain.keys[end - 1]
            self.store.reserve_tail(prompt, chain, end)
            for buffer in (*self.kv, *self.states):
                buffer.zero_()
            assert self.store.queue_load(prompt, chain.keys[:end], torch.arange(end * PAGE))
            assert self.store.queue_tail(prompt, [key], torch.tensor([4]))
            batch = next(self.batches)
            self.store.start_load(batch)
            self.store.start_tail_load(batch)
            assert self.store.finish_load(batch)
            for page, page_key in enumerate(chain.keys[:end]):
                for buffer in self.kv:
                    assert buffer[page * PAGE : (page + 1) * PAGE].equal(content(page_key, PAGE, 1, 4))
            for buffer in self.states:
                assert buffer[4].equal(content(key, *buffer.shape[1:]))
        self.store.leave(prompt)
        self.store.end_pass()
        return end

    def settle(self) -> None:
        deadline = time.monotonic() + 20
        while self.store.flush(1.0):
            assert time.monotonic() < deadline, "never at rest"

    def restart(self) -> None:
        self.settle()
        self.store.close()
        self.open()


@pytest.fixture
def hybrid(tmp_path: Path, gated_reads: Any) -> Iterator[Hybrid]:
    model = Hybrid(tmp_path, gated_reads())
    yield model
    model.io.gate.set()
    model.store.check_invariants()
    model.store.close()


def test_a_prefix_can_be_gone_on_from_where_a_state_was_saved(hybrid: Hybrid) -> None:
    assert hybrid.save("aaa")
    assert hybrid.save("aaaaaa", has_state=False)
    assert hybrid.save("aaaaa")
    chain = Chain(keys_of("aaaaaa"))
    assert hybrid.store.restorable_pages(chain) == 6
    assert list(hybrid.store.ends(chain, 6)) == [5, 3]
    assert list(hybrid.store.ends(chain, 4)) == [3]
    assert hybrid.load("aaaaaa") == 5
    assert hybrid.load("aaab") == 3
    assert hybrid.load("aa") == 0


def test_a_save_is_reported_when_pages_and_state_have_landed(hybrid: Hybrid) -> None:
    hybrid.start_save("aa")
    hybrid.start_save("dd", has_state=False)
    hybrid.store._saves.wait()
    hybrid.store.trailing._saves.wait()
    assert hybrid.store.poll() == 2
    assert hybrid.store.pop_save()
    assert hybrid.store.pop_save()
    state = PageRun(None, 0, keys_of("dd")[-1:], torch.tensor([1]))
    hybrid.store.save(None, trailing=state)
    hybrid.store.trailing._saves.wait()
    assert hybrid.store.poll() == 1
    assert hybrid.store.pop_save()
    assert list(hybrid.store.ends(Chain(keys_of("dd")), 2)) == [2]


def test_what_waits_for_a_state_that_has_not_landed_is_not_reported(
    hybrid: Hybrid, monkeypatch: pytest.MonkeyPatch
) -> None:
    hybrid.start_save("dd", has_state=False)
    hybrid.start_save("aa")
    hybrid.start_save("ff", has_state=False)
    hybrid.store._saves.wait()
    hybrid.store.trailing._saves.wait()
    poll = hybrid.store.trailing.poll
    monkeypatch.setattr(hybrid.store.trailing, "poll", lambda: 0)
    assert hybrid.store.poll() == 1
    monkeypatch.setattr(hybrid.store.trailing, "poll", poll)
    assert hybrid.store.poll() == 3
    assert [hybrid.store.pop_save() for _ in range(3)] == [True] * 3


def test_a_save_without_room_for_its_state_is_not_whole(hybrid: Hybrid) -> None:
    for place, prompt in enumerate(["a", "d", "f"]):
        assert hybrid.save(prompt)
        hybrid.store.trailing.reserve(f"holder {place}", Chain(keys_of(prompt)[-1:]))
    assert not hybrid.save("cc")
    assert hybrid.store.restorable_pages(Chain(keys_of("cc"))) == 2
    hybrid.store.end_pass()
    hybrid.settle()
    assert hybrid.save("cc")


def test_only_what_a_state_follows_is_brought_up(hybrid: Hybrid) -> None:
    hybrid.save("aaa")
    hybrid.save("aaaaaa", has_state=False)
    hybrid.restart()
    chain = hybrid.fetch("aaaaaa")
    assert hybrid.store.restorable_pages(chain) == 6
    assert hybrid.store.loadable_pages(chain) == 3
    assert list(hybrid.store.ends(chain, 3)) == [3]


def test_a_shorter_prefix_is_brought_up_where_ranks_agreed_on_it(hybrid: Hybrid) -> None:
    hybrid.save("aaa")
    hybrid.save("aaaaaa")
    hybrid.restart()
    chain = Chain(keys_of("aaaaaa"))
    assert list(hybrid.store.held_ends(chain, 6)) == [6, 3]
    assert hybrid.store.arrive("request", chain, end=3) == 3
    deadline = time.monotonic() + 20
    while not hybrid.store.is_ready("request"):
        assert time.monotonic() < deadline
        hybrid.store.poll()
    assert list(hybrid.store.ends(chain, 6)) == [3]
    assert hybrid.store.loadable_pages(chain) == 3
    assert hybrid.store.arrive("another", chain) == 6


def test_a_page_that_does_not_come_costs_all_after_the_last_state(hybrid: Hybrid) -> None:
    hybrid.save("aaaaaaaa")
    chain = Chain(keys_of("aaaaaaaa"))
    store = hybrid.store

    def page_tokens(loadable: int, pages: int, on_device: int = 0) -> int:
        return store._per_page(store._lost_tokens(chain, loadable, pages, on_device), pages - loadable)

    assert page_tokens(7, 8) == 8 * PAGE
    assert page_tokens(7, 8, on_device=3) == 5 * PAGE
    hybrid.save("aa")
    assert page_tokens(7, 8) == 6 * PAGE
    assert page_tokens(2, 8) == PAGE
    assert page_tokens(1, 8) == PAGE * 8 // 7
    assert page_tokens(2, 2, on_device=6) == PAGE


def test_it_is_known_where_prompts_go_on(hybrid: Hybrid) -> None:
    hybrid.save("aaa")
    hybrid.save("aaabbb")
    keys = keys_of("aaabbb")
    assert [hybrid.store.is_followed(key) for key in keys] == [True] * 5 + [False]
    hybrid.restart()
    assert [hybrid.store.is_followed(key) for key in keys] == [True] * 5 + [False]
    assert not hybrid.store.is_followed(keys_of("x")[0])


def test_a_state_in_use_does_not_age(hybrid: Hybrid) -> None:
    hybrid.save("aaa")
    states = hybrid.store.trailing
    row = states._index.find(keys_of("aaa")[-1])
    states._index.last_use[row] = 1.0
    hybrid.store.arrive("request", Chain(keys_of("aaa")))
    assert states._index.last_use[row] > 1.0


def test_a_request_waits_for_its_state_as_long_as_its_tokens_are_worth(hybrid: Hybrid) -> None:
    hybrid.save("aaaa")
    hybrid.restart()
    states = hybrid.store.trailing
    hybrid.io.gate.clear()
    state = Chain(keys_of("aaaa")[-1:])
    states._decision.computing.__init__(latency=0.0, rate=1e6)
    states.arrive("many", Chain(state.keys), 1_000_000_000)
    states.arrive("few", Chain(state.keys), 1)
    states.poll()
    assert not states.is_ready("many")
    deadline = time.monotonic() + CEILING / 2
    while not states.is_ready("few"):
        assert time.monotonic() < deadline
        hybrid.store.poll()  # Each pass decides anew.
    states._migration.ahead._waits.clear()
    assert not states.is_ready("many")
    hybrid.store.arrive("request", Chain(keys_of("aaaa")))
    assert not hybrid.store.is_ready("request")


def test_another_state_is_wanted_once_the_last_is_lost(hybrid: Hybrid) -> None:
    hybrid.save("aa")
    hybrid.save("aaaa")
    hybrid.settle()
    chain = Chain(keys_of("aaaa"))
    assert hybrid.store.arrive("request", chain) == 4
    hybrid.store.trailing.leave("request 0")
    assert hybrid.store.trailing.drop(Chain(chain.keys[-1:])) == 1
    assert hybrid.store.arrive("request", chain) == 2
    hybrid.store.reorder(["request"])
    assert hybrid.store.trailing._pages.waiting.requests == ["request 0"]
    hybrid.store.reorder([])
    assert not hybrid.store.trailing._pages.waiting.requests


def test_a_hint_is_for_pages_and_state(hybrid: Hybrid) -> None:
    hybrid.save("aaa")
    hybrid.restart()
    chain = Chain(keys_of("aaa"))
    assert hybrid.store.expect(chain, 5.0) == 3
    hybrid.store.reorder([])
    deadline = time.monotonic() + 20
    while not list(hybrid.store.ends(chain, hybrid.store.loadable_pages(chain))):
        assert time.monotonic() < deadline
        hybrid.store.poll()
    assert hybrid.store.drop(chain) == 3
    assert not hybrid.store.trailing.holds(chain.keys[-1])
    assert hybrid.store.restorable_pages(Chain(keys_of("aaa"))) == 0


def test_what_is_kept_of_a_dropped_conversation_keeps_its_states(hybrid: Hybrid) -> None:
    hybrid.save("aaa")
    hybrid.save("aaabbb")
    hybrid.save("aaaaa")
    hybrid.settle()
    assert hybrid.store.drop(Chain(keys_of("aaabbb"))) == 3
    assert list(hybrid.store.ends(Chain(keys_of("aaaaa")), 5)) == [5, 3]
    assert not hybrid.store.trailing.holds(keys_of("aaabbb")[-1])


def test_a_cancelled_load_holds_nothing(hybrid: Hybrid) -> None:
    hybrid.save("aaa")
    hybrid.settle()
    chain = hybrid.fetch("aaa")
    hybrid.store.reserve("aaa", chain)
    hybrid.store.reserve_tail("aaa", chain, 3)
    assert hybrid.store.queue_load("aaa", chain.keys, torch.arange(3 * PAGE))
    assert hybrid.store.queue_tail("aaa", chain.keys[-1:], torch.tensor([2]))
    assert hybrid.store.cancel_load("aaa")
    assert not hybrid.store.pins
    assert not hybrid.store.trailing.pins


def test_a_flush_forgets_both_and_an_update_of_weights_leaves_both_disks(hybrid: Hybrid) -> None:
    hybrid.save("aaa")
    hybrid.settle()
    hybrid.store.detach_disk()
    assert hybrid.store.disk is None
    assert hybrid.store.trailing.disk is None
    assert hybrid.load("aaa") == 3
    hybrid.start_save("ddd")
    hybrid.store.reset()
    assert hybrid.store.poll() == 0
    assert hybrid.load("aaa") == 0
    assert hybrid.load("ddd") == 0
    assert hybrid.save("ddd")
    assert hybrid.load("ddd") == 3


saved = st.tuples(st.just("save"), st.sampled_from(PROMPTS), st.integers(1, 8), st.booleans())
loaded = st.tuples(st.just("load"), st.sampled_from(PROMPTS), st.just(8), st.just(True))
dropped = st.tuples(st.just("drop"), st.sampled_from(PROMPTS), st.just(8), st.just(True))
restarted = st.tuples(st.just("restart"), st.just(""), st.just(0), st.just(True))


@settings(max_examples=60, deadline=None)
@given(history=st.lists(st.one_of(saved, saved, loaded, loaded, dropped, restarted), max_size=25))
def test_whatever_happens_states_and_pages_are_those_that_were_saved(
    gated_reads: Any, history: list[tuple[str, str, int, bool]]
) -> None:
    with tempfile.TemporaryDirectory() as directory:
        hybrid = Hybrid(Path(directory), gated_reads())
        with_state: set[str] = set()
        for what, prompt, length, has_state in history:
            if what == "save":
                hybrid.save(prompt[:length], has_state)
                with_state |= {prompt[:length]} if has_state else set()
            elif what == "load":
                assert prompt[: hybrid.load(prompt)] in with_state | {""}
            elif what == "drop":
                hybrid.store.drop(Chain(keys_of(prompt)))
            else:
                hybrid.restart()
            hybrid.store.check_invariants()
        hybrid.settle()
        hybrid.store.close()
