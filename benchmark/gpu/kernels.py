"""Do pages move bit for bit, and at what share of a pinned copy's bandwidth?

Saves and loads go through a store, driven as an engine drives it. The reference is one copy of the same bytes
between pinned memory and the device, alternating with ours. A note per page size says whether the store chose a
kernel or the copy engines. On a GPU, loads by the kernel with other numbers of thread blocks follow.
"""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

import torch
from tqdm import tqdm

from benchmark.gpu.bound import Bound
from benchmark.gpu.outcome import Outcome
from benchmark.gpu.setting import Setting
from benchmark.gpu.stored import StoredPages
from benchmark.gpu.sweep import sweep
from benchmark.throughput import Comparison, Contest
from cached_attention.layout import DevicePool
from cached_attention.position.delta_table import delta_table
from cached_attention.position.rotation import Rotation, rotate

PAGE_SIZES = (16, 32, 64, 128, 256)
LOAD_64 = Bound("load, pages of 64 tokens, to a pinned copy", 0.90, at_least=True)
LOAD_16 = Bound("load, pages of 16 tokens, to a pinned copy", 0.80, at_least=True)
EXACT = Bound("bytes that differ after save, load and rotation", 0, unit="")
THETA = 10_000.0
PASSES = 200
"""Over all bytes, each about a millisecond on an H200: together longer than any load here is handed over."""


def pinned_bytes(setting: Setting) -> int:
    """The store's memory, and as much for plain copies."""
    return 2 * _size(setting)


def _size(setting: Setting) -> int:
    """Bytes moved in each round."""
    return 8 << 20 if setting.shape_name == "tiny" else 2 << 30


def run(setting: Setting, outcome: Outcome) -> None:
    wrong, ratios = 0, {}
    for page_size in tqdm(PAGE_SIZES, "page sizes", unit="size"):
        differing, ratios[page_size] = _measure(setting, page_size, outcome)
        wrong += differing
        outcome.save(setting.output)
    loads = [ratios[page_size]["load"] for page_size in (64, 16)]
    outcome.add(LOAD_64.judge(loads[0]), LOAD_16.judge(loads[1]), EXACT.judge(wrong))
    if setting.on_gpu:
        sweep(setting, rotation(setting.head_dim), _size(setting), min(5, _rounds(setting)), outcome)


def _rounds(setting: Setting) -> int:
    return 2 if setting.shape_name == "tiny" else 15


def _measure(setting: Setting, page_size: int, outcome: Outcome) -> tuple[int, dict[str, float]]:
    """How many bytes differ from torch's result, and per direction the ratio to plain copies."""
    bench, ratios = Moves(setting, page_size, _size(setting)), {}
    with bench.stored:
        outcome.notes += [f"pages of {page_size} tokens: {line}" for line in bench.stored.ways()]
        wrong = bench.check(outcome)
        for direction, contest in bench.contests().items():
            comparison = Comparison("host", direction, page_size, bench.page_bytes, bench.moved_bytes)
            for _ in contest.run(comparison, _rounds(setting)):
                pass
            outcome.rows.append(_row(comparison))
            ratios[direction] = comparison.ratio
        if setting.on_gpu:
            outcome.notes.append(f"pages of {page_size} tokens: {bench.hand_over()}")
    return wrong, ratios


def _row(comparison: Comparison) -> dict[str, Any]:
    speeds = {
        "ours_gb_per_s": comparison.ours_bytes_per_s / 1e9,
        "pinned_copy_gb_per_s": comparison.raw_bytes_per_s / 1e9,
    }
    return asdict(comparison) | speeds | {"ratio": comparison.ratio}


class Moves:
    """A pool of random values, a store below it, and plain copies of as many bytes.

    Args:
        size: bytes to move, rounded down to whole pages; at least two pages are moved.
    """

    def __init__(self, setting: Setting, page_size: int, size: int) -> None:
        shape = setting.shape
        self._device, self._page_size = setting.device, page_size
        self.page_bytes = setting.kv_bytes * page_size
        self._pages = max(2, size // self.page_bytes)
        self.moved_bytes = self._pages * self.page_bytes
        slots = self._pages * page_size
        generator = torch.Generator(self._device).manual_seed(0)
        sizes = (shape.layers, 2, slots, shape.kv_heads, setting.head_dim)
        self._kv = torch.empty(sizes, dtype=setting.dtype, device=self._device).normal_(generator=generator)
        self._rotation = rotation(setting.head_dim)
        pool = DevicePool([list(layer) for layer in self._kv], page_size)
        self.stored = StoredPages(pool, self._pages, [self._rotation] * shape.layers)
        shuffled = torch.randperm(self._pages, generator=torch.Generator().manual_seed(1))
        self._order: list[int] = shuffled.tolist()
        self._source, self._target = (self.stored.slots(order) for order in (self._order, self._order[::-1]))
        self._keys: list[bytes] = []
        self._moved: list[bytes] = []
        self._pinned = torch.zeros(self.moved_bytes, dtype=torch.uint8, pin_memory=setting.on_gpu)
        self._flat = torch.zeros(self.moved_bytes, dtype=torch.uint8, device=self._device)

    def check(self, outcome: Outcome) -> int:
        """Save in one order, load in another; returns how many bytes differ from torch's result."""
        before = self._kv.clone()
        self._rename()
        self.stored.save(self._keys, self._source)
        wrong = 0
        for drop in (0, 1, self._pages // 2):
            count = self._differing(before, drop)
            found = {"page_tokens": self._page_size, "moved_by_tokens": -drop * self._page_size}
            outcome.rows.append({"check": "bytes that differ", **found, "bytes": count})
            wrong += count
        self._kv.copy_(before)
        return wrong

    def contests(self) -> dict[str, Contest]:
        less = self.page_bytes
        return {
            "save": Contest(self._save, lambda: self._copy(self._pinned, self._flat), self._rename),
            "load": Contest(self._load, lambda: self._copy(self._flat, self._pinned)),
            "load, rotated": Contest(
                self._load_moved, lambda: self._copy(self._flat[less:], self._pinned[less:]), self._truncate
            ),
        }

    def hand_over(self) -> str:
        """How long a load keeps the scheduler's thread while a forward runs that it has to wait for.

        A stream's queue is finite: a call that finds it full would wait for that forward.
        """
        self._rename()
        self.stored.save(self._keys, self._source)
        idle = self.stored.hand_over(self._keys, self._target, [])
        with torch.cuda.stream(torch.cuda.Stream(self._device)):
            began, ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            began.record()
            for _ in range(PASSES):
                self._flat.add_(1)
            ended.record()
        behind = self.stored.hand_over(self._keys, self._target, [ended])
        return (
            f"a load of {self._pages} pages is handed over in {1e3 * idle:.2f} ms, and in {1e3 * behind:.2f} ms "
            f"behind a stream that is busy for {began.elapsed_time(ended):.0f} ms"
        )

    def _differing(self, before: torch.Tensor, drop: int) -> int:
        self._kv.zero_()
        self._synchronize()
        keys = self.stored.moved_chain(self._keys, drop) if drop else self._keys
        self.stored.load(keys, self._target[: len(keys) * self._page_size])
        expected = self._by_page(before)[:, :, self._order[drop:]]
        if drop:
            table = delta_table(self._rotation, [-drop * self._page_size]).to(self._device)
            for keys_and_values in expected:
                keys_and_values[0] = rotate(keys_and_values[0], table, self._rotation)
        loaded = self._by_page(self._kv)[:, :, self._order[::-1][: len(keys)]]
        return int((loaded.view(torch.uint8) != expected.view(torch.uint8)).sum())

    def _by_page(self, kv: torch.Tensor) -> torch.Tensor:
        return kv.unflatten(2, (self._pages, self._page_size))

    def _rename(self) -> None:
        self.stored.forget()
        self._keys = self.stored.new_chain(self._pages)

    def _truncate(self) -> None:
        self._moved = self.stored.moved_chain(self._keys, drop=1)

    def _save(self) -> None:
        self.stored.save(self._keys, self._source)

    def _load(self) -> None:
        self.stored.load(self._keys, self._target)

    def _load_moved(self) -> None:
        self.stored.load(self._moved, self._target[self._page_size :])

    def _copy(self, target: torch.Tensor, source: torch.Tensor) -> None:
        target.copy_(source, non_blocking=True)
        self._synchronize()

    def _synchronize(self) -> None:
        if self._kv.is_cuda:
            torch.cuda.synchronize(self._device)


def rotation(head_dim: int, theta: float = THETA) -> Rotation:
    """Llama's rotation: the two halves of a head form the pairs."""
    return Rotation(tuple(theta ** (-2 * pair / head_dim) for pair in range(head_dim // 2)))
