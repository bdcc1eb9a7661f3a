"""The store over a device pool in CPU memory: what is saved comes back, and nothing leaks."""

from __future__ import annotations

import threading
from hashlib import sha256

import pytest
import torch

from cached_attention.chain import Chain, PageRun
from cached_attention.config import Eviction
from cached_attention.layout import DevicePool
from cached_attention.store import CachedAttentionStore

PAGE = 4
LAYERS = 3


class Engine:
    """A device pool with a store under it, and prompts that are named by strings."""

    def __init__(self, host_pages: int, device_pages: int = 32) -> None:
        shape = (device_pages * PAGE, 2, 8)
        self.buffers = [[torch.randn(shape, dtype=torch.bfloat16) for _ in "kv"] for _ in range(LAYERS)]
        self.pool = DevicePool(self.buffers, PAGE)
        self.now = 0.0
        self.store = CachedAttentionStore(self.pool, host_pages * self.pool.layout.stride, clock=self.tick)
        self.batches = 0

    def tick(self) -> float:
        self.now += 1
        return self.now

    @staticmethod
    def keys(name: str, pages: int) -> list[bytes]:
        return [sha256(f"{name[: i + 1] if len(name) > i else name}/{i}".encode()).digest() for i in range(pages)]

    def run(self, keys: list[bytes], first: int, device: list[int]) -> PageRun:
        slots = torch.tensor([page * PAGE + i for page in device for i in range(PAGE)])
        parent = keys[first - 1] if first else None
        return PageRun(parent, first, keys[first : first + len(device)], slots)

    def save(self, keys: list[bytes], device: list[int], first: int = 0) -> bool:
        self.store.save(self.run(keys, first, device))
        self.store._saves.wait()
        assert self.store.poll() == 1
        return self.store.pop_save()

    def load(self, keys: list[bytes], device: list[int], first: int = 0) -> None:
        run = self.run(keys, first, device)
        assert self.store.queue_load("r", run.keys, run.device_slots)
        self.batches += 1
        layers = self.store.start_load(self.batches).layers
        assert self.store.finish_load(self.batches)
        assert [layer.query() for layer in layers] == [True] * LAYERS

    def page(self, page: int) -> torch.Tensor:
        parts = [buffer[page * PAGE : (page + 1) * PAGE].flatten() for layer in self.buffers for buffer in layer]
        return torch.cat(parts).clone()

    def restorable(self, keys: list[bytes]) -> int:
        return self.store.restorable_pages(Chain(list(keys)))


@pytest.fixture
def engine():
    engine = Engine(host_pages=8)
    yield engine
    engine.store.end_pass()
    engine.store.check_invariants()
    engine.store.close()


def test_saved_pages_come_back_bit_for_bit_at_other_places(engine: Engine) -> None:
    keys = engine.keys("abcd", 4)
    before = [engine.page(page) for page in (3, 9, 1, 5)]
    assert engine.save(keys, [3, 9, 1, 5])
    assert engine.restorable(keys) == 4
    engine.load(keys, [20, 18, 25, 7])
    for page, expected in zip((20, 18, 25, 7), before, strict=True):
        assert torch.equal(engine.page(page), expected)


def test_a_load_may_start_in_the_middle_of_a_chain(engine: Engine) -> None:
    keys = engine.keys("abcd", 4)
    before = engine.page(1)
    engine.save(keys, [3, 9, 1, 5])
    engine.load(keys, [30], first=2)
    assert torch.equal(engine.page(30), before)


def test_nothing_is_reported_before_its_bytes_have_landed(engine: Engine) -> None:
    released = threading.Event()

    class Fence:
        def synchronize(self) -> None:
            assert released.wait(5)

    keys = engine.keys("ab", 2)
    engine.store.save(engine.run(keys, 0, [1, 2]), [Fence()])
    assert engine.store.poll() == 0
    assert engine.restorable(keys) == 0
    assert not engine.store.queue_load("r", keys, torch.arange(2 * PAGE))
    engine.store.check_invariants()
    released.set()
    engine.store._saves.wait()
    assert engine.store.poll() == 1
    assert engine.store.pop_save()
    assert engine.restorable(keys) == 2


def test_the_coldest_conversation_leaves_first_and_its_tail_before_its_head(engine: Engine) -> None:
    cold, warm, new = (engine.keys(name, 4) for name in ("cold", "warm", "news"))
    engine.save(cold, [0, 1, 2, 3])
    engine.save(warm, [4, 5, 6, 7])
    engine.save(new, [8, 9, 10], first=0)
    assert engine.restorable(cold) == 1
    assert engine.restorable(warm) == 4
    assert engine.store.counters()["evicted"] == 3
    engine.save(new, [11], first=3)
    assert engine.restorable(cold) == 0
    assert engine.restorable(new) == 4


def test_asking_for_a_conversation_keeps_it_warm(engine: Engine) -> None:
    first, second, new = (engine.keys(name, 4) for name in ("abcd", "efgh", "ijkl"))
    engine.save(first, [0, 1, 2, 3])
    engine.save(second, [4, 5, 6, 7])
    engine.store.reserve("r", Chain(list(first)))
    engine.store.end_pass()
    engine.save(new, [8, 9], first=0)
    assert engine.restorable(first) == 4
    assert engine.restorable(second) == 2


def test_a_shared_prefix_outlives_its_branches(engine: Engine) -> None:
    left, right, new = engine.keys("ssll", 4), engine.keys("ssrr", 4), engine.keys("newx", 4)
    engine.save(left, [0, 1, 2, 3])
    engine.save(right, [0, 1, 4, 5])
    assert engine.store.resident_pages == 6
    engine.save(new, [8, 9, 10, 11])
    assert engine.restorable(left) == 2
    assert engine.restorable(right) == 4


def test_reserved_pages_stay_and_saves_are_declined_instead(engine: Engine) -> None:
    kept, other = engine.keys("abcdefgh", 8), engine.keys("xy", 2)
    engine.save(kept, list(range(8)))
    assert engine.store.reserve("r", Chain(list(kept))) == 8
    assert not engine.save(other, [10, 11])
    assert engine.store.stats.declined == 2
    engine.store.end_pass()
    assert engine.save(other, [10, 11])
    assert engine.restorable(kept) == 6


def test_a_conversation_longer_than_the_tier_keeps_its_head(engine: Engine) -> None:
    keys = engine.keys("abcdefghijkl", 12)
    assert not engine.save(keys, list(range(12)))
    assert engine.restorable(keys) == 8


def test_pages_are_not_saved_after_a_gap(engine: Engine) -> None:
    keys = engine.keys("abcd", 4)
    run = engine.run(keys, 2, [2, 3])
    assert engine.store.lacks_parent(run)
    assert not engine.save(keys, [2, 3], first=2)
    assert engine.store.resident_pages == 0


def test_a_cancelled_load_lets_its_pages_go(engine: Engine) -> None:
    keys = engine.keys("ab", 2)
    engine.save(keys, [0, 1])
    engine.store.reserve("r", Chain(list(keys)))
    assert engine.store.queue_load("r", keys, torch.arange(2 * PAGE))
    with pytest.raises(ValueError, match="queued already"):
        engine.store.queue_load("r", keys, torch.arange(2 * PAGE))
    engine.store.end_pass()
    assert engine.store.cancel_load("r")
    assert not engine.store.cancel_load("r")
    assert not engine.store.has_queued_loads
    engine.store.check_invariants()


def test_a_failed_save_leaves_nothing_behind(engine: Engine) -> None:
    class Broken:
        def synchronize(self) -> None:
            raise RuntimeError("the device is gone")

    keys = engine.keys("abc", 3)
    engine.store.save(engine.run(keys, 0, [0, 1]), [Broken()])
    engine.store.save(engine.run(keys, 2, [2]))
    engine.store._saves.wait()
    assert engine.store.poll() == 2
    assert [engine.store.pop_save(), engine.store.pop_save()] == [False, True]
    assert engine.restorable(keys) == 0
    engine.store.check_invariants()
    assert engine.save(keys, [0, 1, 2])
    assert engine.restorable(keys) == 3


def test_a_failed_load_is_told_and_pins_go(engine: Engine) -> None:
    keys = engine.keys("ab", 2)
    engine.save(keys, [0, 1])
    assert engine.store.queue_load("r", keys, torch.tensor([10**6] * 2 * PAGE))
    load = engine.store.start_load(7)
    assert not engine.store.finish_load(7)
    assert isinstance(load.error, IndexError)
    assert [layer.query() for layer in load.layers] == [True] * LAYERS
    engine.store.check_invariants()


def test_reset_forgets_everything(engine: Engine) -> None:
    keys, chain = engine.keys("abcd", 4), Chain(engine.keys("abcd", 4))
    engine.save(keys, [0, 1, 2, 3])
    assert engine.store.restorable_pages(chain) == 4
    engine.store.save(engine.run(engine.keys("efgh", 4), 0, [4, 5, 6, 7]))
    engine.store.reset()
    assert engine.store.restorable_pages(chain) == 0
    assert engine.store.resident_pages == 0
    assert engine.store.poll() == 0
    assert engine.save(keys, [0, 1, 2, 3])


def test_the_memo_of_a_chain_follows_what_leaves_and_comes(engine: Engine) -> None:
    keys = engine.keys("abcd", 4)
    chain = Chain(list(keys))
    engine.save(keys, [0, 1])
    assert engine.store.restorable_pages(chain) == 2
    engine.save(keys, [2, 3], first=2)
    assert engine.store.restorable_pages(chain) == 4
    engine.save(engine.keys("efghij", 6), [4, 5, 6, 7, 8, 9])
    assert engine.store.restorable_pages(chain) == 2


def test_a_tier_too_small_for_a_page_is_refused() -> None:
    pool = DevicePool([[torch.zeros(8, 2, 8)]], PAGE)
    with pytest.raises(ValueError, match="hold no page"):
        CachedAttentionStore(pool, 100)


def test_a_strided_pool_is_refused() -> None:
    with pytest.raises(ValueError, match="not contiguous"):
        DevicePool([[torch.zeros(8, 2, 8).transpose(0, 1)]], PAGE)


@pytest.mark.parametrize("eviction", list(Eviction))
def test_whether_uses_are_learnt_is_a_choice(eviction: Eviction) -> None:
    engine = Engine(host_pages=8)
    store = CachedAttentionStore(engine.pool, 8 * engine.pool.layout.stride, eviction=eviction)
    keys = engine.keys("abcd", 4)
    for turn in range(3):
        store.arrive(f"request {turn}", Chain(keys))
    store.save(engine.run(keys, 0, [3, 9, 1, 5]))
    store._saves.wait()
    store.poll()
    assert any(store._index.kind) == (eviction is Eviction.LEARNT)
    store.close()
    engine.store.close()
