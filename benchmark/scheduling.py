"""What does the hierarchy cost the scheduler's thread?

    python -m benchmark.scheduling      # 1,000 waiting requests of 160 pages each, a million pages in the index

A pass is everything that a scheduling pass of SGLang asks of the store: the queue as it is and in its new order,
what has arrived from disk, further fetches, whether each waiting request may run, and a hold on the pages of
those that are admitted. As many requests arrive as are admitted; the cost of an arrival, which notes that the
pages of its chain are in use, is a row of its own. A quarter of the requests have their pages on disk only and
wait for them, since the model is slow; they are fetched meanwhile. Between two passes the thread runs small
tensor operations for as long as a decode step takes, like a forward that launches kernels; reads finish
meanwhile, on other threads. Finally host memory is full, and pages are evicted to make room for others.
"""

from __future__ import annotations

import argparse
import gc
import json
import random
import sys
import tempfile
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path

import numpy as np
import torch
from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Table
from tqdm import tqdm

from benchmark.report import machine
from cached_attention import admission
from cached_attention.chain import Chain, PageRun
from cached_attention.fingerprint import Fingerprint
from cached_attention.layout import DevicePool
from cached_attention.store import CachedAttentionStore
from cached_attention.tiers.disk import DiskTier

PAGE_BYTES, PAGE_TOKENS = 4096, 64
FORWARD = 0.01
"""Seconds from one pass to the next."""
ADMITTED = 4
"""Requests admitted in a pass, and arriving after it."""
SHUFFLED = 10
"""Passes after which the order of the queue changes."""
ON_DISK = 0.25
"""Share of the waiting requests that have their pages on disk only."""
BOUND_MEDIAN, BOUND_P99, BOUND_EVICT = 1e-3, 5e-3, 2e-3
"""Seconds per pass or arrival, and per thousand evicted pages."""


@dataclass(frozen=True)
class Cost:
    """Seconds on the scheduler's thread."""

    what: str
    seconds: list[float]
    bounds: dict[str, float]

    @property
    def quantiles(self) -> dict[str, float]:
        names, levels = ("P50", "P99", "max"), (0.5, 0.99, 1.0)
        return dict(zip(names, np.quantile(self.seconds, levels).tolist(), strict=True))

    @property
    def holds(self) -> bool:
        return all(self.quantiles[name] <= bound for name, bound in self.bounds.items())


class Queue:
    """A store of many pages, and requests that wait for some of them."""

    def __init__(self, directory: Path, args: argparse.Namespace) -> None:
        self._args = args
        self._words = random.Random(args.seed)
        shape = args.chain * PAGE_TOKENS, PAGE_BYTES // PAGE_TOKENS // 2
        self._pool = DevicePool([[torch.zeros(shape, dtype=torch.uint8) for _ in "KV"]], PAGE_TOKENS)
        self._hidden, self._weight = torch.randn(16, 256), torch.randn(256, 256)
        self._directory = directory
        on_disk = [self._keys() for _ in range(int(ON_DISK * args.waiting))]
        self._fill_disk(on_disk)
        self.store = self._open(args.pages)
        for _ in range(20):
            self.store.prefill_took(PAGE_TOKENS, 60.0)
        in_host = [self._keys() for _ in range((args.pages - len(on_disk) * args.chain) // args.chain)]
        for keys in tqdm(in_host, desc="pages in host memory", unit="conversation", leave=False):
            self._place(keys)
        first = [*on_disk, *in_host[: args.waiting - len(on_disk)]]
        self._words.shuffle(first)
        self._later = deque(in_host[args.waiting - len(on_disk) :])
        self._arrived = 0
        self.waiting: list[tuple[str, Chain]] = []
        self.arrivals: list[float] = []
        """Seconds that the store took for each."""
        for keys in first:
            self._arrive(keys)

    def _keys(self) -> list[bytes]:
        return [self._words.randbytes(32) for _ in range(self._args.chain)]

    def _open(self, pages: int) -> CachedAttentionStore:
        sizes = self._pool.layout.component_bytes
        fingerprint = Fingerprint("benchmark", "none", "bytes", PAGE_TOKENS, sizes, {}, {})
        disk = DiskTier(self._directory, fingerprint, 1 << 30)
        return CachedAttentionStore(self._pool, pages * PAGE_BYTES, disk)

    def _fill_disk(self, chains: Sequence[list[bytes]]) -> None:
        store = self._open(len(chains) * self._args.chain)
        for keys in tqdm(chains, desc="pages on disk", unit="conversation", leave=False):
            store.save(PageRun(None, 0, keys, torch.arange(len(keys) * PAGE_TOKENS)))
        if store.flush(300):
            raise OSError("the disk did not take all pages in five minutes")
        store.close()

    def _place(self, keys: Sequence[bytes]) -> None:
        """Add pages as if they had been requested and saved long ago, and were on disk as well."""
        pages = self.store._pages
        pages.note_prompt("earlier", keys, time.time())
        pages.next_use.ran("earlier", time.time())
        rows: list[int] = []
        for place, key in enumerate(keys):
            row = admission.admit(pages, key, keys[place - 1] if place else None, place * PAGE_TOKENS)
            if row is None:
                break
            rows.append(row)
        for row in rows:
            pages.land(row, clean=True)
            pages.unpin(row)

    def _arrive(self, keys: list[bytes]) -> None:
        name, chain = f"request-{self._arrived}", Chain(keys)
        self._arrived += 1
        self.arrivals.append(_timed(lambda: self._match(name, chain)))
        self.waiting.append((name, chain))

    def _match(self, name: str, chain: Chain) -> None:
        """What SGLang asks when a request arrives, and again before it runs."""
        self.store.arrive(name, chain)
        self.store.reserve(name, chain)

    def run_pass(self, number: int) -> float:
        """Run one pass; returns the seconds that the store took."""
        self._forward()
        before = [name for name, _ in self.waiting]
        if number % SHUFFLED == 0:
            self._words.shuffle(self.waiting)
        names = [name for name, _ in self.waiting]
        started = time.perf_counter()
        store = self.store
        store.end_pass()
        store.reorder(before)
        store.poll()
        store.reorder(names)
        ready = [store.is_ready(name) for name in names]
        admitted = list(islice((i for i, is_ready in enumerate(ready) if is_ready), ADMITTED))
        for i in admitted:
            self._match(*self.waiting[i])
            store.leave(names[i])
        seconds = time.perf_counter() - started
        for i in reversed(admitted):
            self._later.append(self.waiting.pop(i)[1].keys)
            self._arrive(self._later.popleft())
        return seconds

    def _forward(self) -> None:
        until = time.perf_counter() + FORWARD
        while time.perf_counter() < until:
            self._hidden + torch.nn.functional.silu(self._hidden @ self._weight) @ self._weight

    def evict(self, pages: int) -> float:
        """Seconds to evict `pages` pages from host memory; as many new ones take their slots afterwards."""
        seconds = _timed(lambda: admission.make_room(self.store._pages, pages, None))
        self.fill_up()
        return seconds

    def fill_up(self) -> None:
        """Add pages until no host slot is free; nothing is waiting then."""
        self.store.reorder([])
        self.store.end_pass()
        while free := self.store.host.free_slots:
            self._place([self._words.randbytes(32) for _ in range(min(self._args.chain, free))])


def _timed(work: Callable[[], object]) -> float:
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


def measure(queue: Queue, args: argparse.Namespace) -> Iterator[Cost]:
    passes = [queue.run_pass(i) for i in tqdm(range(args.passes), desc="scheduling passes", leave=False)]
    yield Cost("scheduling pass", passes, {"P50": BOUND_MEDIAN, "P99": BOUND_P99})
    yield Cost("arrival", queue.arrivals, {"P50": BOUND_MEDIAN, "P99": BOUND_P99})
    queue.fill_up()
    evictions = [queue.evict(1000) for _ in tqdm(range(args.evictions), desc="evictions", leave=False)]
    yield Cost("1,000 pages evicted", evictions, {"P50": BOUND_EVICT})


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pages", type=int, default=1_000_000, help="in the index")
    parser.add_argument("--waiting", type=int, default=1_000, help="requests")
    parser.add_argument("--chain", type=int, default=160, help="pages of a request")
    parser.add_argument("--passes", type=int, default=500)
    parser.add_argument("--evictions", type=int, default=50, help="of 1,000 pages each")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, default=Path("out/scheduling"), help="of .json and .png")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    args = parse(arguments)
    with tempfile.TemporaryDirectory() as directory:
        queue = Queue(Path(directory), args)
        gc.freeze()  # As the server does once its store is open.
        costs = list(measure(queue, args))
        queue.store.close()
    _report(args, costs)
    return 0 if all(cost.holds for cost in costs) else 1


def _report(args: argparse.Namespace, costs: Sequence[Cost]) -> None:
    table = Table(
        title=f"{args.waiting:,} waiting requests of {args.chain} pages, {args.pages:,} pages in the index",
        title_justify="left",
    )
    for name in ("", "P50", "P99", "max", "bound", ""):
        table.add_column(name, justify="right" if name else "left")
    for cost in costs:
        bounds = ", ".join(f"{name} {bound * 1e3:g} ms" for name, bound in cost.bounds.items())
        values = [f"{value * 1e3:.2f} ms" for value in cost.quantiles.values()]
        table.add_row(cost.what, *values, bounds, "holds" if cost.holds else "does not hold")
    console = Console()
    console.print(table)
    args.output.parent.mkdir(parents=True, exist_ok=True)
    content = {"parameters": vars(args), "machine": machine(), "costs": [asdict(cost) for cost in costs]}
    args.output.with_suffix(".json").write_text(json.dumps(content, indent=1, default=str) + "\n")
    _save_figure(args.output.with_suffix(".png"), costs)
    console.print(f"saved {args.output.with_suffix('.json')} and {args.output.with_suffix('.png')}")


def _save_figure(path: Path, costs: Sequence[Cost]) -> None:
    figure = Figure(figsize=(10, 3.6), layout="constrained")
    for axes, cost in zip(figure.subplots(1, len(costs)), costs, strict=True):
        times = np.sort(cost.seconds) * 1e3
        axes.step([0, *times], np.linspace(0, 1, len(times) + 1), where="post", color="#0072b2")
        for bound in cost.bounds.values():
            axes.axvline(bound * 1e3, color="#d55e00", linestyle="dotted")
        axes.set(title=cost.what, xlabel="milliseconds, bounds dotted", ylabel="share", xlim=(0, None))
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=150)


if __name__ == "__main__":
    sys.exit(main())
