"""How long does a returning turn wait when its history is loaded while the model is already computing?

One request at a time, a prefill in plain torch over a store's pool, in four ways: the history is on the device;
it is loaded layer by layer during the forward; it is loaded first, then the forward runs; it is recomputed.

`floor_s` of a point is the lower limit for any engine, unless its load starts before the forward could: the
longer of the forward alone and of a pinned copy of the history's bytes, measured in the same run. If the copy
takes longer than the forward, a hit in host memory cannot equal one on the device: the outcome says so.

A note says whether loads are made by a kernel or by copy engines. `CACHED_ATTENTION_BLOCKS` in the environment is
the number of thread blocks of a load by the kernel, 32 without it.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from tqdm import tqdm

from benchmark.gpu.bound import Bound, Verdict
from benchmark.gpu.forward import Llama
from benchmark.gpu.outcome import Outcome
from benchmark.gpu.setting import Setting
from benchmark.gpu.stopwatch import Mark, Stopwatch
from benchmark.gpu.stored import Arrival, StoredPages
from cached_attention.kernels.rope_on_load import BLOCKS, BLOCKS_VARIABLE

PAGE = 64
DEVICE, LAYER_WISE, LOAD_FIRST, RECOMPUTE = WAYS = ("device", "layer-wise", "load-then-compute", "recompute")


@dataclass(frozen=True)
class Grid:
    """Lengths in tokens; histories in whole pages."""

    histories: tuple[int, ...]
    news: tuple[int, ...]
    hit_history: int
    """History for which a host hit is compared with a device hit, with every number of new tokens."""
    reduction_at: tuple[int, int] | None
    """History and new tokens for which a host hit is compared with recomputing."""
    rounds: int


GRIDS = {
    "llama-3-8b": Grid((1_024, 4_096, 8_192, 16_384, 32_768), (100, 500, 1_000, 2_000), 8_192, None, 5),
    "llama-2-13b": Grid((1_024, 4_096, 8_192), (100, 500, 1_000, 2_000), 8_192, (4_096, 100), 5),
    "tiny": Grid((64, 256), (16, 64), 256, (256, 16), 2),
}
EQUAL = Bound("hits whose logits differ from a device hit's", 0, unit="")


def hit_bound(grid: Grid) -> Bound:
    return Bound(f"TTFT of a host hit to a device hit, {grid.hit_history} + {min(grid.news)} or more", 1.10)


def reduction_bound(history: int, new: int) -> Bound:
    return Bound(f"TTFT saved against recompute, {history} + {new}", 0.87, at_least=True, unit="")


def pinned_bytes(setting: Setting) -> int:
    """The store's memory, and as much for plain copies."""
    return 2 * max(GRIDS[setting.shape_name].histories) * setting.kv_bytes


def run(setting: Setting, outcome: Outcome) -> None:
    grid = GRIDS[setting.shape_name]
    bench = Turns(setting, grid)
    points = [(history, new) for history in grid.histories for new in grid.news]
    differing = 0
    with bench.stored:
        outcome.notes += bench.stored.ways()
        outcome.notes.append(f"loads by the kernel use {BLOCKS} blocks; {BLOCKS_VARIABLE} is another number")
        for history, new in tqdm(points, "history + new", unit="point"):
            row = bench.measure(history, new, grid.rounds)
            differing += row["differing"]
            outcome.rows.append(row)
            outcome.save(setting.output)
    outcome.add(*_verdicts(grid, outcome.rows), EQUAL.judge(differing))
    _note_the_link(grid, outcome)


def _verdicts(grid: Grid, rows: list[dict[str, Any]]) -> Iterator[Verdict]:
    hits = [row for row in rows if row["history"] == grid.hit_history]
    yield hit_bound(grid).judge(max(row["ttft_s"][LAYER_WISE] / row["ttft_s"][DEVICE] for row in hits))
    if grid.reduction_at is not None:
        (row,) = (row for row in rows if (row["history"], row["new"]) == grid.reduction_at)
        saved = 1 - row["ttft_s"][LAYER_WISE] / row["ttft_s"][RECOMPUTE]
        yield reduction_bound(*grid.reduction_at).judge(saved)


def _note_the_link(grid: Grid, outcome: Outcome) -> None:
    for row in outcome.rows:
        if row["history"] == grid.hit_history and row["copy_s"] > row["ttft_s"][DEVICE]:
            outcome.notes.append(
                f"{row['history']} + {row['new']}: a pinned copy of the history takes {row['copy_s']:.4f} s, "
                f"the forward {row['ttft_s'][DEVICE]:.4f} s; layer-wise is {row['to_floor']:.3f}x the longer"
            )


class Turns:
    """A model, its longest history in a store, and the ways to answer with a part of it."""

    def __init__(self, setting: Setting, grid: Grid) -> None:
        longest = max(grid.histories)
        self._kv_bytes = setting.kv_bytes
        self._watch = Stopwatch(setting.device)
        self._model = Llama(setting, -(-(longest + max(grid.news)) // PAGE) * PAGE, PAGE)
        self.stored = StoredPages(self._model.pool, longest // PAGE)
        self._slots = self.stored.slots(range(longest // PAGE))
        self._keys = self.stored.new_chain(longest // PAGE)
        self._history, self._question = self._model.words(longest), self._model.words(max(grid.news))
        self._model.prefill(self._history, 0)
        self._watch.synchronize()
        self.stored.save(self._keys, self._slots)
        size = longest * setting.kv_bytes
        self._pinned = torch.zeros(size, dtype=torch.uint8, pin_memory=setting.on_gpu)
        self._flat = torch.zeros(size, dtype=torch.uint8, device=setting.device)

    def measure(self, history: int, new: int, rounds: int) -> dict[str, Any]:
        """The row of one point: medians over the rounds, with alternating ways, after a warm-up round."""
        ways = self._ways(history, new)
        seconds: dict[str, list[float]] = {way: [] for way in (*WAYS, "copy")}
        exposed: list[list[float]] = []
        differing = 0
        for number in range(1 + rounds):
            logits = {}
            for way in sorted(WAYS, reverse=bool(number % 2)):
                elapsed, logits[way] = self._time(ways[way], way, history)
                seconds[way].append(elapsed)
            differing += sum(not torch.equal(logits[way], logits[DEVICE]) for way in (LAYER_WISE, LOAD_FIRST))
            exposed.append(self._exposed(self._question[:new], history))
            seconds["copy"].append(self._copy(history))
        ttft = {way: statistics.median(seconds[way][1:]) for way in WAYS}
        copy = statistics.median(seconds["copy"][1:])
        floor = max(ttft[DEVICE], copy)
        return {
            "history": history,
            "new": new,
            "ttft_s": ttft,
            "copy_s": copy,
            "floor_s": floor,
            "to_floor": ttft[LAYER_WISE] / floor,
            "exposed_s": [statistics.median(layer) for layer in zip(*exposed[1:], strict=True)],
            "differing": differing,
            "rounds_s": seconds,
        }

    def _ways(self, history: int, new: int) -> dict[str, Callable[[], torch.Tensor]]:
        question = self._question[:new]
        everything = torch.cat((self._history[:history], question))
        return {
            DEVICE: lambda: self._model.prefill(question, history),
            LAYER_WISE: lambda: self._layer_wise(question, history, lambda arrival: arrival.wait),
            LOAD_FIRST: lambda: self._load_first(question, history),
            RECOMPUTE: lambda: self._model.prefill(everything, 0),
        }

    def _time(self, way: Callable[[], torch.Tensor], name: str, history: int) -> tuple[float, torch.Tensor]:
        """Seconds and logits of one way; the history is first put on the device for a device hit, else wiped."""
        if name == DEVICE:
            self.stored.load(*self._part(history))
        else:
            self._model.kv[:, :, :history].zero_()
        self._watch.synchronize()
        started = time.perf_counter()
        logits = way()
        self._watch.synchronize()
        return time.perf_counter() - started, logits

    def _layer_wise(
        self, question: torch.Tensor, history: int, waiting: Callable[[Arrival], Callable[[int], None]]
    ) -> torch.Tensor:
        number, arrival = self.stored.start_load(*self._part(history))
        logits = self._model.prefill(question, history, waiting(arrival))
        self.stored.finish_load(number)
        return logits

    def _exposed(self, question: torch.Tensor, history: int) -> list[float]:
        """Seconds that each layer waited, in a separate run: the marks take time themselves."""
        marks: list[tuple[Mark, Mark]] = []

        def marked(arrival: Arrival) -> Callable[[int], None]:
            def wait(layer: int) -> None:
                before = self._watch.mark()
                arrival.wait(layer)
                marks.append((before, self._watch.mark()))

            return wait

        self._time(lambda: self._layer_wise(question, history, marked), LAYER_WISE, history)
        return [self._watch.seconds(*pair) for pair in marks]

    def _load_first(self, question: torch.Tensor, history: int) -> torch.Tensor:
        self.stored.load(*self._part(history))
        return self._model.prefill(question, history)

    def _part(self, history: int) -> tuple[list[bytes], torch.Tensor]:
        return self._keys[: history // PAGE], self._slots[:history]

    def _copy(self, history: int) -> float:
        size = history * self._kv_bytes
        started = time.perf_counter()
        self._flat[:size].copy_(self._pinned[:size], non_blocking=True)
        self._watch.synchronize()
        return time.perf_counter() - started
