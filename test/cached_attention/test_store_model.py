"""Random histories of the store against a model: what it reports it holds, and what it holds is right."""

from __future__ import annotations

from hashlib import sha256

import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from cached_attention.chain import Chain, PageRun
from cached_attention.layout import DevicePool
from cached_attention.store import CachedAttentionStore

PAGE = 2
HOST_PAGES = 6
DEVICE_PAGES = 12
PROMPTS = ["aaaaaa", "aaabbb", "aacccc", "ddd", "ddeeeeee"]


def keys_of(prompt: str) -> list[bytes]:
    return [sha256(prompt[: i + 1].encode()).digest() for i in range(len(prompt))]


def content(key: bytes) -> torch.Tensor:
    """What the page `key` holds, `[PAGE, 1, 4]`: the same wherever and whenever it is computed."""
    generator = torch.Generator().manual_seed(int.from_bytes(key[:4]))
    return torch.rand(PAGE, 1, 4, generator=generator)


class Histories(RuleBasedStateMachine):
    @initialize()
    def start(self) -> None:
        self.buffers = [[torch.zeros(DEVICE_PAGES * PAGE, 1, 4) for _ in "kv"] for _ in range(2)]
        pool = DevicePool(self.buffers, PAGE)
        self.now = 0.0
        self.store = CachedAttentionStore(pool, HOST_PAGES * pool.layout.stride, clock=self.tick)
        self.chains = {prompt: Chain(keys_of(prompt)) for prompt in PROMPTS}
        self.reserved: dict[str, int] = {}
        self.queued: set[str] = set()
        self.batch = 0

    def teardown(self) -> None:
        if hasattr(self, "store"):
            self.store.close()

    def tick(self) -> float:
        self.now += 1
        return self.now

    def run(self, prompt: str, first: int, count: int) -> PageRun:
        """Pages of `prompt` as a forward leaves them on the device, from device page 0."""
        keys = keys_of(prompt)[first : first + count]
        for page, key in enumerate(keys):
            for layer in self.buffers:
                for buffer in layer:
                    buffer[page * PAGE : (page + 1) * PAGE] = content(key)
        parent = keys_of(prompt)[first - 1] if first else None
        return PageRun(parent, first, keys, torch.arange(len(keys) * PAGE))

    @rule(prompt=st.sampled_from(PROMPTS), first=st.integers(0, 7), count=st.integers(1, 8))
    def save(self, prompt: str, first: int, count: int) -> None:
        if first >= len(prompt):
            return
        run = self.run(prompt, first, count)
        lacking = self.store.lacks_parent(run)
        before = self.store.counters()["evicted"]
        self.store.save(run)
        self.store._saves.wait()
        assert self.store.poll() == 1
        if self.store.pop_save():
            assert not lacking
            assert self.store.restorable_pages(self.chains[prompt]) >= first + len(run.keys)
        if lacking:
            assert self.store.counters()["evicted"] == before

    @rule(prompt=st.sampled_from(PROMPTS))
    def reserve(self, prompt: str) -> None:
        self.reserved[prompt] = self.store.reserve(prompt, self.chains[prompt])
        assert self.reserved[prompt] == self.store.restorable_pages(Chain(keys_of(prompt)))

    @rule()
    def end_pass(self) -> None:
        self.store.end_pass()
        self.reserved.clear()

    @precondition(lambda self: self.reserved)
    @rule(data=st.data())
    def queue_and_load(self, data: st.DataObject) -> None:
        """What was reserved can be loaded, whatever was saved since, and is what was saved."""
        prompt = data.draw(st.sampled_from(sorted(self.reserved)))
        pages = self.reserved[prompt]
        if not pages:
            return
        first = data.draw(st.integers(0, pages - 1))
        keys = keys_of(prompt)[first:pages]
        places = data.draw(st.permutations(range(DEVICE_PAGES)))[: len(keys)]
        slots = torch.tensor([page * PAGE + i for page in places for i in range(PAGE)])
        assert self.store.queue_load(prompt, keys, slots)
        if data.draw(st.booleans()):
            assert self.store.cancel_load(prompt)
            del self.reserved[prompt]
            return
        self.batch += 1
        self.store.start_load(self.batch)
        assert self.store.finish_load(self.batch)
        for key, page in zip(keys, places, strict=True):
            for layer in self.buffers:
                for buffer in layer:
                    assert torch.equal(buffer[page * PAGE : (page + 1) * PAGE], content(key))

    @rule()
    def reset(self) -> None:
        self.store.reset()
        self.reserved.clear()
        assert self.store.resident_pages == 0

    @invariant()
    def whole(self) -> None:
        if hasattr(self, "store"):
            self.store.check_invariants()
            assert self.store.resident_pages <= HOST_PAGES
            for prompt, pages in self.reserved.items():
                assert self.store.restorable_pages(self.chains[prompt]) >= pages


TestHistories = Histories.TestCase
TestHistories.settings = settings(max_examples=40, stateful_step_count=40, deadline=None)
