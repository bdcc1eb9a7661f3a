"""Schedule fuzzer: an engine on the store, each side of which is slow at random, and every byte looked at.

The forward, loads, saves, the computing of page numbers and their way to the host are streams, as on a GPU:
nothing is ordered but by events. The scheduler runs ahead of all of them. It lets go of the slots of a request
as soon as its last forward is launched, and gives them to the next: at once, or when it evicts them. Loads wait
for as little as `LoadFence` says. Some prompts are truncated ones, whose pages are those of others, turned when
they are loaded. Half of the seeds run the copier of CPUs, half that of GPUs with its code for sm_90a.
`SCHEDULES` in the environment is the number of seeds.
"""

from __future__ import annotations

import os
import random
import time
from collections.abc import Callable, Iterable
from functools import cache, partial
from hashlib import sha256
from typing import ClassVar, NamedTuple

import numpy as np
import pytest
import torch

from cached_attention import store as store_module
from cached_attention.chain import Chain, PageRun
from cached_attention.checksum import page_checksum
from cached_attention.layout import DevicePool
from cached_attention.position.delta_table import delta_table
from cached_attention.position.rotation import Rotation, rotate
from cached_attention.store import CachedAttentionStore
from cached_attention.transfer import jobs
from cached_attention.transfer.copier import CpuCopier, PageCopier
from cached_attention.transfer.cpu_stream import CpuStream
from cached_attention.transfer.cuda_copier import CudaCopier
from cached_attention.transfer.load_fence import LoadFence
from cached_attention.transfer.streams import STREAMS, Event, Op, Priority, make_stream

SCHEDULES = int(os.environ.get("SCHEDULES", "300"))
MOST_UNTIL_FOUND = 200
PAGE = 2
LAYERS = 3
DEVICE_PAGES = 16
HOST_PAGES = 9
PASSES = 16
FORWARDS = (1, 1, 1, 2, 3)
"""Of a request."""
DIM = 12
"""Elements of a token's K and of its V."""
TURN = Rotation(tuple(100.0 ** (-i / DIM) for i in range(0, DIM, 2)))
TRUNCATED = {"Abbb": ("aaabbb", [0, 3, 4, 5]), "eeee": ("ddeeee", [2, 3, 4, 5]), "Acc": ("aacccc", [0, 2, 3])}
"""Per prompt: of which other one its pages are, and which of its pages."""
PROMPTS = ["aaaaaa", "aaabbb", "aacccc", "ddd", "ddeeee", "f", *TRUNCATED]
CPU = torch.device("cpu")


class DelayedStream(CpuStream):
    """Waits a while, often not at all, before each op."""

    chance: ClassVar[random.Random]
    slowness: ClassVar[dict[str, float]]
    """Seconds, at most, by name of the stream."""
    deaf: ClassVar[str] = ""
    """The planted bug: name of the stream that waits for nothing."""

    def __init__(self, device: torch.device, name: str, priority: Priority) -> None:
        self._name = name
        self._own_chance = random.Random(self.chance.random())
        super().__init__(device, name, priority)

    def run(self, ops: Iterable[Op]) -> list[Event]:
        return super().run([partial(self._late, op) for op in ops])

    def wait(self, event: Event) -> None:
        if self._name != self.deaf:
            super().wait(event)

    def _late(self, op: Op) -> None:
        if (slowness := self.slowness[self._name]) and self._own_chance.random() < 0.5:
            time.sleep(self._own_chance.random() * slowness)
        op()


@cache
def keys_of(prompt: str) -> list[bytes]:
    return [sha256(prompt[: i + 1].encode()).digest() for i in range(len(prompt))]


def source_of(prompt: str) -> list[bytes]:
    """Keys of the pages that a truncated prompt shares with another one."""
    original, pages = TRUNCATED[prompt]
    return [keys_of(original)[page] for page in pages]


@cache
def moved() -> dict[bytes, tuple[bytes, int]]:
    """Per page of a truncated prompt: the page it is, and by how many tokens it comes later."""
    return {
        key: (source, (place - page) * PAGE)
        for prompt, (_, pages) in TRUNCATED.items()
        for place, (key, source, page) in enumerate(zip(keys_of(prompt), source_of(prompt), pages, strict=True))
    }


@cache
def content(key: bytes, layer: int, component: int) -> np.ndarray:
    """`[bytes of a page]`: what one component of page `key` must be, wherever it is."""
    source, delta = moved().get(key, (key, 0))
    chance = torch.Generator().manual_seed(int.from_bytes(source[:4]) + 2 * layer + component)
    page = torch.randn(PAGE, 1, DIM, generator=chance).bfloat16()
    if delta and component == 0:
        page = rotate(page, delta_table(TURN, [delta]), TURN)
    return page.contiguous().view(torch.uint8).flatten().numpy()


class Plan(NamedTuple):
    prompt: str
    pages: list[int]
    """On the device, one per page of the prompt."""
    loaded: int
    """How many of them, from the first, are loaded."""
    lock: object
    """On its part of the tree."""
    forwards: int


class Engine:
    """Runs prompts at random, one batch after the other.

    Args:
        slowness: seconds, at most, of sides that are not to be slow at random.
    """

    def __init__(self, seed: int, **slowness: float) -> None:
        self.chance = random.Random(seed)
        sides = ("schedule", "numbers", "forward", "load", "save", "scheduler")
        DelayedStream.chance = self.chance
        DelayedStream.slowness = {side: self.chance.choice([0, 0, 1e-4, 1e-3]) for side in sides} | slowness
        self.slowness = DelayedStream.slowness["scheduler"]
        sizes = (DEVICE_PAGES * PAGE, 1, DIM)
        pool = DevicePool([[torch.zeros(sizes).bfloat16() for _ in "kv"] for _ in range(LAYERS)], PAGE)
        self.pages = [[buffer.numpy() for buffer in layer] for layer in pool.layers]
        self.store = CachedAttentionStore(pool, HOST_PAGES * pool.layout.stride, rotations=[TURN] * LAYERS)
        self.store._transfers.checksums = True
        self.forward, self.schedule = (make_stream(CPU, name, Priority.LOW) for name in ("forward", "schedule"))
        self.free = list(range(DEVICE_PAGES))
        self.frees = 0
        self.tree: list[int] = []
        """Pages that nobody holds, which were not freed."""
        self.running: list[Plan] = []
        self.fence = LoadFence(lambda: self.frees)
        self.saving: list[list[int]] = []
        """Device pages of each save that was not reported."""
        self.batch = 0
        self.mismatches: list[str] = []

    def run(self) -> list[str]:
        try:
            for _ in range(PASSES):
                self.one_pass()
                if self.slowness and self.chance.random() < 0.5:
                    time.sleep(self.chance.random() * self.slowness)
            self.drain()
            self.look_at_all()
            self.store.check_invariants()
        finally:
            self.forward.close()
            self.schedule.close()
            self.store.close()
        return self.mismatches

    def one_pass(self) -> None:
        """Plan a batch, start its loads, launch its forward, save what is new, let go of what is not needed."""
        self.poll()
        new = [plan for name in "rs"[: self.chance.randint(0, 2)] if (plan := self.admit(name))]
        plans = [*self.running, *new]
        if not plans:
            self.wait_for_saves()
        self.batch += 1
        layers = None
        if self.store.has_queued_loads:
            layers = self.store.start_load(self.batch, self.unused()).layers
        self.forward.wait(self.schedule.record())
        for layer in range(LAYERS):
            if layers is not None:
                layers[layer].wait(self.forward)
            self.forward.run([partial(self.compute, plan, layer) for plan in plans])
        if layers is not None and not self.store.finish_load(self.batch, self.forward):
            self.mismatches.append("a load failed")
        self.fence.launched([self.forward.record()])
        self.running = []
        for plan in plans:
            if plan.forwards > 1:
                self.running.append(self.go_on(plan))
            else:
                self.end(plan)
        self.store.end_pass()
        if self.chance.random() < 0.7:
            # As SGLang, which reads the result of the forward before the one that it launched.
            for event in self.fence.earlier:
                event.synchronize()

    def go_on(self, plan: Plan) -> Plan:
        """All of it is its own now and computed again, to the same bytes; it may give back a page."""
        prompt, pages, loaded, lock, forwards = plan
        if len(pages) > 1 and self.chance.random() < 0.3:
            self.give_back(pages[-1:])
            prompt, pages = prompt[:-1], pages[:-1]
        return Plan(prompt, pages, self.chance.randint(0, min(loaded, len(pages))), lock, forwards - 1)

    def admit(self, request: str) -> Plan | None:
        prompt = self.chance.choice(PROMPTS)
        keys = keys_of(prompt)
        lock = object()
        self.fence.locked(lock)
        self.evict(max(len(keys) - len(self.free), self.chance.randint(0, 2)))
        if len(self.free) < len(keys):
            self.fence.unlocked(lock)
            return None
        self.chance.shuffle(self.free)
        chain = Chain(list(keys))
        self.store.left_device(keys)
        if prompt in TRUNCATED:
            self.store.alias(chain, [source_of(prompt)])
        loaded = self.store.reserve(request, chain)
        pages = [self.free.pop() for _ in keys]
        if loaded:
            slots = self.slots(pages[:loaded])
            if not self.store.queue_load(request, keys[:loaded], slots, [self.schedule.record()]):
                self.mismatches.append("what was reserved could not be loaded")
        return Plan(prompt, pages, loaded, lock, self.chance.choice(FORWARDS))

    def evict(self, count: int) -> None:
        self.chance.shuffle(self.tree)
        with self.fence.evicting():
            evicted, self.tree = self.tree[:count], self.tree[count:]
            self.give_back(evicted)

    def give_back(self, pages: list[int]) -> None:
        if pages:
            self.free += pages
            self.frees += 1

    def slots(self, pages: list[int]) -> torch.Tensor:
        """Token slots as the allocator leaves them on a GPU: to be computed, nonsense until then."""
        slots = torch.zeros(len(pages) * PAGE, dtype=torch.int64)
        true = torch.tensor([page * PAGE + i for page in pages for i in range(PAGE)])
        self.schedule.run([partial(np.copyto, slots.numpy(), true.numpy())])
        return slots

    def ready(self) -> list[Event]:
        return [self.schedule.record(), self.forward.record()]

    def unused(self) -> list[Event]:
        """The slots of loads that start now are computed, and no forward touches them."""
        return self.ready() if self.fence.is_closed else [self.schedule.record(), *self.fence.earlier]

    def compute(self, plan: Plan, layer: int) -> None:
        """One layer: look at what was loaded, write what is new, look at all of it."""
        prompt, pages, loaded, *_ = plan
        self.look_at(prompt, pages[:loaded], layer)
        for key, page in list(zip(keys_of(prompt), pages, strict=True))[loaded:]:
            for component, buffer in enumerate(self.pages[layer]):
                buffer[page] = content(key, layer, component)
        self.look_at(prompt, pages, layer)

    def look_at(self, prompt: str, pages: list[int], layer: int) -> None:
        for key, page in zip(keys_of(prompt), pages, strict=False):
            for component, buffer in enumerate(self.pages[layer]):
                if not np.array_equal(buffer[page], content(key, layer, component)):
                    self.mismatches.append(f"{prompt}, device page {page}, layer {layer}")

    def end(self, plan: Plan) -> None:
        """Its last forward is launched, no more. Pages that are saved stay locked until that is reported."""
        prompt, pages, loaded, lock, _ = plan
        keys = keys_of(prompt)
        first = self.chance.randint(0, loaded)
        self.fence.unlocked(lock)
        if first < len(keys):
            parent = keys[first - 1] if first else None
            run = PageRun(parent, first, list(keys[first:]), self.slots(pages[first:]))
            self.store.save(run, self.ready())
            self.saving.append(pages[first:])
        if self.chance.random() < 0.5:
            self.give_back(pages[:first])
        else:
            self.tree += pages[:first]

    def poll(self) -> None:
        for _ in range(self.store.poll()):
            self.store.pop_save()
            self.tree += self.saving.pop(0)

    def drain(self) -> None:
        self.wait_for_saves()
        held = [page for plan in self.running for page in plan.pages]
        assert sorted(self.free + self.tree + held) == list(range(DEVICE_PAGES))

    def wait_for_saves(self) -> None:
        self.forward.record().synchronize()
        while self.saving:
            self.store._saves.wait()
            self.poll()

    def look_at_all(self) -> None:
        """Every page that the store says it has, one prompt at a time."""
        for number, prompt in enumerate(PROMPTS):
            keys = keys_of(prompt)
            if not (count := self.store.reserve(prompt, Chain(list(keys)))):
                continue
            slots = torch.arange(count * PAGE)
            assert self.store.queue_load(prompt, keys[:count], slots)
            self.store.start_load(-1 - number)
            assert self.store.finish_load(-1 - number)
            for layer in range(LAYERS):
                self.look_at(prompt, list(range(count)), layer)
            index = self.store._index
            for row in map(index.find, keys[:count]):
                record, origin = self.store.host.record(self.store._in_host.slot[row]), index.aliases.origin(row)
                if index.checksum[origin] != page_checksum(index.key(origin), record):
                    self.mismatches.append(f"{prompt}: a checksum")


@pytest.fixture
def loads(cuda_on_host: type[CudaCopier], monkeypatch: pytest.MonkeyPatch) -> set[tuple[bool, bool]]:
    """Of the copier of GPUs: whether page numbers were on the host, and whether some pages of a load turned."""
    seen = set()
    inner = cuda_on_host.moves

    def moves(copier: CudaCopier, pages: torch.Tensor | np.ndarray, slots: list[int], deltas: list[int]) -> list:
        seen.add((isinstance(pages, np.ndarray), 0 in deltas and any(deltas)))
        return inner(copier, pages, slots, deltas)

    monkeypatch.setattr(cuda_on_host, "moves", moves)
    return seen


@pytest.fixture
def delayed(cuda_on_host: type[CudaCopier], monkeypatch: pytest.MonkeyPatch) -> None:
    kinds: list[Callable[..., PageCopier]] = [CpuCopier, cuda_on_host]
    # Asked once per engine, whose chances are those of the streams.
    monkeypatch.setattr(store_module, "page_copier", lambda *parts: DelayedStream.chance.choice(kinds)(*parts))
    monkeypatch.setitem(STREAMS, "cpu", DelayedStream)
    monkeypatch.setattr(DelayedStream, "deaf", "")
    monkeypatch.setattr(jobs, "SAVED_AT_ONCE", 1)
    monkeypatch.setattr(jobs, "MAKE_WAY", 1e-3)


@pytest.fixture
def fences(monkeypatch: pytest.MonkeyPatch) -> set[bool]:
    """Whether loads had to wait for the last forward."""
    seen = set()
    inner = Engine.unused

    def unused(engine: Engine) -> list[Event]:
        seen.add(engine.fence.is_closed)
        return inner(engine)

    monkeypatch.setattr(Engine, "unused", unused)
    return seen


def test_no_schedule_makes_a_wrong_byte(delayed: None, loads: set[tuple[bool, bool]], fences: set[bool]) -> None:
    for seed in range(SCHEDULES):
        assert Engine(seed).run() == [], f"seed {seed}"
    assert len(loads) == 4, "not every way to load was taken"
    assert len(fences) == 2, "loads did not both wait and not wait for the last forward"


def found_at(seeds: int, **slowness: float) -> int | None:
    return next((seed for seed in range(seeds) if Engine(seed, **slowness).run()), None)


@pytest.mark.parametrize("deaf", ["load", "save", "forward", "numbers"])
def test_a_stream_that_waits_for_nothing_is_found_out(
    delayed: None, monkeypatch: pytest.MonkeyPatch, deaf: str
) -> None:
    """Loads into slots that are still used, saves of what is not written, reads of what is not there, copies to
    pages whose numbers were not computed."""
    monkeypatch.setattr(DelayedStream, "deaf", deaf)
    assert found_at(MOST_UNTIL_FOUND) is not None


def nothing(*_: object) -> None: ...


@pytest.mark.parametrize("blind_to", ["locks", "frees"])
def test_a_fence_that_does_not_see_what_is_let_go_is_found_out(
    delayed: None, monkeypatch: pytest.MonkeyPatch, blind_to: str
) -> None:
    """Loads into slots of a request whose forward runs."""
    if blind_to == "locks":
        monkeypatch.setattr(LoadFence, "unlocked", nothing)
    else:
        monkeypatch.setattr(Engine, "give_back", lambda engine, pages: engine.free.extend(pages))
    assert found_at(MOST_UNTIL_FOUND, forward=2e-3, load=0, scheduler=0) is not None
