"""The forward waits for the layers of its own batch, and for nothing else."""

from __future__ import annotations

from inspect import signature, unwrap
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from sglang.srt.managers.tp_worker import BaseTpWorker, TpModelWorker
from sglang.srt.mem_cache.cached_attention.layer_events import LayerEvents
from sglang.srt.mem_cache.cached_attention.never_waits import CHECK_WAITS, never_waits
from sglang.srt.mem_cache.cached_attention.plugin import _wait_for_loads


class Asked:
    """An event that remembers how often it was waited for; nothing ever happens."""

    def __init__(self) -> None:
        self.times = 0

    def query(self) -> bool:
        return False

    def wait(self, stream: Any = None) -> None:
        self.times += 1

    def synchronize(self) -> None:
        raise AssertionError("the CPU waits")


def test_a_layer_of_the_batch_that_runs_is_waited_for_and_no_other() -> None:
    counter = LayerEvents(2)
    batches = [[Asked(), Asked()] for _ in range(2)]
    for layers in batches:
        counter.add(counter.next_batch(), layers)
    counter.set_consumer(1)
    counter.wait_until(0)
    counter.wait_until(0)
    assert [[layer.times for layer in layers] for layers in batches] == [[0, 0], [2, 0]]
    assert counter.num_layers == 2
    assert counter.consumer_index == 1


def test_a_forward_without_loads_or_after_them_waits_for_nothing() -> None:
    counter = LayerEvents(1)
    event = Asked()
    batch = counter.next_batch()
    counter.add(batch, [event])
    counter.set_consumer(-1)
    counter.wait_until(0)
    counter.set_consumer(batch)
    counter.discard(batch)
    counter.wait_until(0)
    assert event.times == 0
    counter.reset()
    assert counter.next_batch() == batch


def test_a_batch_tells_once_how_long_its_layers_were_waited_for() -> None:
    waits: list[float] = []
    counter = LayerEvents(2, waits.append)
    counter.wait_until(0)
    assert not waits, "a batch without loads"
    batch = counter.next_batch()
    counter.add(batch, [Asked(), Asked()])
    counter.set_consumer(batch)
    for layer in range(2):
        counter.wait_until(layer)
    counter.discard(batch)
    (waited,) = waits
    assert waited > 0


def test_calls_are_as_they_are_where_nothing_is_to_be_checked(monkeypatch: pytest.MonkeyPatch) -> None:
    def call() -> None: ...

    monkeypatch.delenv(CHECK_WAITS, raising=False)
    assert never_waits(call) is call


@pytest.mark.gpu
def test_a_call_that_waits_for_a_gpu_raises(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(CHECK_WAITS, "1")
    with pytest.raises(RuntimeError, match="synchronizing"):
        never_waits(lambda: torch.ones(1, device="cuda").item())()
    assert torch.cuda.get_sync_debug_mode() == 0


def test_an_embedding_waits_for_its_layers_too() -> None:
    """SGLang says which loads a forward waits for where it generates only."""
    counter = LayerEvents(1)
    worker = SimpleNamespace(set_hicache_consumer=counter.set_consumer, hicache_layer_transfer_counter=counter)
    batch = counter.next_batch()
    event = Asked()
    counter.add(batch, [event])
    _wait_for_loads(worker, SimpleNamespace(hicache_consumer_index=batch))
    counter.wait_until(0)
    assert event.times == 1
    worker.hicache_layer_transfer_counter = None
    _wait_for_loads(worker, SimpleNamespace(hicache_consumer_index=7))
    assert counter.consumer_index == batch
    assert callable(TpModelWorker.set_hicache_consumer)
    assert list(signature(unwrap(BaseTpWorker.forward_batch_embedding)).parameters) == ["self", "batch"]
