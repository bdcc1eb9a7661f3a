"""A layer goes to the other ranks once, in order, and after it has landed on the first."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
from sglang.srt.mem_cache.cached_attention.layer_events import LayerEvents
from sglang.srt.mem_cache.cached_attention.mla_dedup import MlaDedupLinker, Relay

LAYERS = 4


class Landed:
    """A layer of the first rank that notes when it is waited for."""

    def __init__(self, number: int, log: list[str]) -> None:
        self._number = number
        self._log = log

    def wait(self, stream: Any = None) -> None:
        self._log.append(f"landed {self._number}")


@pytest.fixture
def log() -> list[str]:
    return []


def relay(log: list[str], keeps: bool) -> Relay:
    landed = [Landed(layer, log) for layer in range(LAYERS)] if keeps else []
    return Relay(LAYERS, landed, lambda layer: log.append(f"sent {layer}"))


def test_a_layer_is_sent_once_however_often_it_is_read(log: list[str]) -> None:
    layers = relay(log, keeps=True).layers
    for layer in layers:
        layer.wait()
        layer.wait()
    assert log == [step for layer in range(LAYERS) for step in (f"landed {layer}", f"sent {layer}")]


@pytest.mark.parametrize("keeps", [True, False])
def test_all_ranks_send_in_the_same_order_whatever_is_read_first(log: list[str], keeps: bool) -> None:
    loading = relay(log, keeps)
    loading.layers[2].wait()
    loading.layers[0].wait()
    loading.send_all()
    loading.send_all()
    assert [step for step in log if step.startswith("sent")] == [f"sent {layer}" for layer in range(LAYERS)]


def test_the_forward_of_another_batch_sends_nothing(log: list[str]) -> None:
    counter = LayerEvents(LAYERS)
    counter.add(counter.next_batch(), relay(log, keeps=False).layers)
    counter.set_consumer(-1)
    counter.wait_until(LAYERS - 1)
    assert log == []
    counter.set_consumer(0)
    counter.wait_until(1)
    assert log == ["sent 0", "sent 1"]


def test_a_rank_that_keeps_nothing_says_so(caplog: pytest.LogCaptureFixture) -> None:
    rank: Any = SimpleNamespace(_keeps=False)
    with caplog.at_level("INFO"):
        MlaDedupLinker.announce(rank)
    assert caplog.messages == ["CachedAttention: this rank gets its pages from the first rank."]
