"""Streams of threads, and what the transfers make of them: nobody but a transfer thread waits."""

from __future__ import annotations

import ast
import inspect
import threading
import time
from collections.abc import Callable, Iterator
from hashlib import sha256
from pathlib import Path
from typing import Any

import pytest
import torch

import cached_attention
from cached_attention.chain import Chain, PageRun
from cached_attention.layout import DevicePool
from cached_attention.store import CachedAttentionStore
from cached_attention.transfer import jobs
from cached_attention.transfer.cpu_stream import CpuEvent, CpuStream
from cached_attention.transfer.streams import Priority, make_stream

PAGE = 4
LAYERS = 3
PAGES = 16
CPU = torch.device("cpu")
MOST_DEVICE_MEMORY = 6 << 20
"""Bytes: a block of torch's allocator per stream, of loads, of saves and of the forward."""
WAITS = {"tolist", "item", "cpu", "numpy", "synchronize", "nonzero"}
"""What makes the CPU wait for a GPU, when it is called on a tensor or an event of it."""


@pytest.fixture
def stream() -> Iterator[CpuStream]:
    stream = CpuStream(CPU, "test", Priority.LOW)
    yield stream
    stream.close()


def test_ops_run_in_order_after_what_they_wait_for_and_nobody_waits_meanwhile(stream: CpuStream) -> None:
    gate, order = CpuEvent(), list[int]()
    first = stream.record()
    stream.wait(gate)
    events = stream.run([lambda i=i: order.append(i) for i in range(5)])
    first.synchronize()
    assert not any(event.query() for event in events)
    gate.happen()
    events[-1].synchronize()
    assert order == [0, 1, 2, 3, 4]
    assert all(event.query() for event in events)


def test_a_stream_waits_for_another(stream: CpuStream) -> None:
    gate, other = CpuEvent(), CpuStream(CPU, "other", Priority.HIGH)
    other.wait(gate)
    other.record().wait(stream)
    after = stream.record()
    assert not after.query()
    gate.happen()
    after.synchronize()
    other.close()


def test_an_error_belongs_to_the_event_and_the_stream_goes_on(stream: CpuStream) -> None:
    ran = []
    failed, fine = stream.run([lambda: 1 // 0, lambda: ran.append("fine")])
    with pytest.raises(ZeroDivisionError):
        failed.synchronize()
    fine.synchronize()
    stream.wait(failed)
    left_out, next_one = stream.run([lambda: ran.append("left out"), lambda: ran.append("next")])
    with pytest.raises(ZeroDivisionError):
        left_out.synchronize()
    next_one.synchronize()
    assert ran == ["fine", "next"]


def test_a_device_without_streams_is_refused() -> None:
    with pytest.raises(ValueError, match="no streams for 'meta'"):
        make_stream(torch.device("meta"), "load", Priority.LOW)


class Store:
    """A store over `PAGES` device pages, of which the first half has been saved under `keys`."""

    def __init__(self, device: torch.device = CPU, sealed: bool = False) -> None:
        self.buffers = [[torch.rand(PAGES * PAGE, 2, 8).to(device) for _ in "kv"] for _ in range(LAYERS)]
        pool = DevicePool(self.buffers, PAGE)
        self.store = CachedAttentionStore(pool, PAGES * pool.layout.stride)
        self.keys = [sha256(bytes([i])).digest() for i in range(PAGES // 2)]

    def save(self, slots: torch.Tensor, after: Any = ()) -> None:
        self.store.save(PageRun(None, 0, self.keys, slots), after)

    def saved(self) -> None:
        self.store._saves.wait()
        assert self.store.poll() == 1
        assert self.store.pop_save()

    def queue(self, slots: torch.Tensor, known: Any = None) -> None:
        assert self.store.reserve("r", Chain(self.keys)) == len(self.keys)
        assert self.store.queue_load("r", self.keys, slots, known)
        self.store.end_pass()

    def halves_are_equal(self) -> bool:
        half = PAGES * PAGE // 2
        return all(torch.equal(buffer[:half], buffer[half:]) for layer in self.buffers for buffer in layer)


SAVED = torch.arange(PAGES * PAGE // 2)
LOADED = SAVED + PAGES * PAGE // 2


@pytest.fixture
def store() -> Iterator[Store]:
    store = Store()
    yield store
    store.store.close()


def test_a_load_waits_for_the_forward_before_and_keeps_its_pages_until_it_has_ended(
    store: Store, stream: CpuStream
) -> None:
    store.save(SAVED)
    store.saved()
    store.queue(LOADED)
    running = CpuEvent()
    load = store.store.start_load(0, [running])
    assert store.store.finish_load(0, stream)
    forward = stream.record()
    store.store.poll()
    assert store.store.pins == 1
    assert not any(layer.query() for layer in load.layers)
    assert not forward.query()
    running.happen()
    forward.synchronize()
    assert store.halves_are_equal()
    store.store.poll()
    assert store.store.pins == 0
    store.store.check_invariants()


def test_a_save_makes_way_for_a_load_that_copies_but_not_for_ever(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    store.save(SAVED)
    store.saved()
    store.queue(LOADED)
    transfers, copying, running = store.store._transfers, threading.Event(), CpuEvent()
    load = transfers._copier.load
    monkeypatch.setattr(transfers._copier, "load", lambda *layer: copying.wait() and load(*layer))
    store.store.start_load(0, [running])
    assert not transfers._is_loading(), "it waits for a forward itself"
    running.happen()
    deadline = time.monotonic() + 20
    while not transfers._is_loading():
        assert time.monotonic() < deadline
    more = PageRun(store.keys[-1], len(store.keys), [sha256(b"more").digest()], LOADED[:PAGE])
    store.store.save(more)
    store.saved()
    copying.set()
    assert store.store.finish_load(0)
    store.store._loads.wait()
    assert not transfers._is_loading()


def test_why_saves_fail_is_said_once_a_minute(
    store: Store, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(*_: object) -> None:
        raise RuntimeError("the device is on fire")

    monkeypatch.setattr(store.store._transfers._copier, "save", fail)
    for _ in range(3):
        store.save(SAVED)
        store.store._saves.wait()
        assert store.store.poll() == 1
        assert not store.store.pop_save()
    (said,) = caplog.records
    assert "pages could not be copied" in said.getMessage()
    assert said.exc_info is not None
    assert "on fire" in str(said.exc_info[1])
    assert store.store.stats.failed == 3 * len(store.keys)


class DeviceNumbers(torch.Tensor):
    """Slot numbers as on a GPU, where they are not computed yet: the scheduler's thread may not look at them."""

    @classmethod
    def __torch_function__(cls, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None) -> Any:
        looks = func.__name__ in {*WAITS, "__index__", "__bool__", "__int__", "__contains__", "__iter__"}
        by_list = func.__name__ == "__getitem__" and isinstance(args[1], list)
        if (looks or by_list) and threading.current_thread() is threading.main_thread():
            raise AssertionError(f"{func.__name__} on the scheduler's thread")
        return super().__torch_function__(func, types, args, kwargs or {})


def on_device(slots: torch.Tensor) -> torch.Tensor:
    return slots.clone().as_subclass(DeviceNumbers)


def test_the_scheduler_looks_at_no_number_that_the_device_computes(store: Store) -> None:
    with pytest.raises(AssertionError, match="tolist"):
        on_device(SAVED).tolist()
    half = len(store.keys) // 2
    store.store.save(PageRun(None, 0, store.keys[:half], on_device(SAVED[: half * PAGE])))
    store.saved()
    # The first half is there, so that pages are picked out of the run.
    store.save(on_device(SAVED))
    store.saved()
    store.queue(on_device(LOADED))
    store.store.start_load(0)
    assert store.store.finish_load(0)
    assert store.halves_are_equal()


def calls_that_wait(path: Path, but_not_in: set[str]) -> list[str]:
    found = []
    for function in ast.walk(ast.parse(path.read_text())):
        if isinstance(function, ast.FunctionDef) and function.name not in but_not_in:
            for node in ast.walk(function):
                if (
                    isinstance(node, ast.Call)
                    and isinstance(node.func, ast.Attribute)
                    and node.func.attr in WAITS
                ):
                    found.append(f"{path.name}:{node.lineno} {function.name}: {node.func.attr}()")
    return found


def test_no_call_that_waits_for_the_device_is_on_the_schedulers_way() -> None:
    """Where one is allowed, it is the thread of saves, the start, or the end that calls it."""
    here, linker = Path(inspect.getfile(cached_attention)).parent, "python/sglang/srt/mem_cache/cached_attention"
    allowed = {
        here / "store.py": set(),
        here / "loading.py": {"wait"},
        here / "saving.py": set(),
        here / "awaited_saves.py": set(),
        here / "outlooks.py": set(),
        here / "reach.py": set(),
        here / "transfer" / "jobs.py": {"_save"},
        here / "transfer" / "layer_wise_load.py": set(),
        here / "transfer" / "page_numbers.py": {"_pages"},  # Numbers that have arrived.
        here / "transfer" / "cuda_stream.py": {"close"},
        here / "transfer" / "cuda_copier.py": {"_time"},
        here.parent / linker / "linker.py": set(),
        here.parent / linker / "layer_events.py": set(),
    }
    assert [call for path, names in allowed.items() for call in calls_that_wait(path, names)] == []
    assert calls_that_wait(Path(jobs.__file__), set())


@pytest.mark.gpu
def test_a_gpu_is_never_waited_for() -> None:
    gpu = torch.device("cuda")
    store = Store(gpu)
    saved, loaded = SAVED.to(gpu), LOADED.to(gpu)
    forward = torch.cuda.Stream()
    torch.cuda.synchronize()
    before = torch.cuda.memory_reserved()
    torch.cuda.set_sync_debug_mode("error")
    try:
        with torch.cuda.stream(forward):
            store.save(saved, [forward.record_event()])
        store.saved()
        store.queue(loaded, [torch.cuda.current_stream().record_event()])
        with torch.cuda.stream(forward):
            load = store.store.start_load(0, [forward.record_event()])
            for layer in load.layers:
                layer.wait()
        assert store.store.finish_load(0, forward)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    forward.synchronize()
    assert torch.cuda.memory_reserved() - before <= MOST_DEVICE_MEMORY
    assert store.halves_are_equal()
    store.store.close()
