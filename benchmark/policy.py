"""Which policy keeps what will be needed again? Replays a trace in virtual time, beside the offline optimum.

Requests run when they arrive:

    python -m benchmark.policy --trace conversation.jsonl --capacity 1000 2000 5000

Under load, with 50, 200 and 500 requests waiting at all times:

    python -m benchmark.policy --trace conversation.jsonl --capacity 1000 --queue 50 200 500

Arriving as in the trace, on a machine that takes 1.2 times as long for everything:

    python -m benchmark.policy --trace conversation.jsonl --capacity 1000 --slower 1.2

The trace is JSONL in Mooncake's format, with an id per block of 512 tokens. The hit rate counts every block of
every prompt, including blocks seen for the first time. The gap is the one between LRU and the optimum (Belady's,
for the same execution order): a policy at LRU's hit rate closes 0% of it.

A queue covers a capacity if the pages that would fill it are known: if, on average, as many pages as the tier
holds are needed by a request that was already waiting when they were last used. Only for those can look-ahead
know at that moment that they should stay. `known` counts them. `wanted` counts the distinct pages of all prompts
in the queue; most of these were never computed before, and need no space until they are.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import NullLocator, PercentFormatter, ScalarFormatter
from rich.console import Console
from rich.table import Table
from tqdm import tqdm

from benchmark.report import machine
from cached_attention.index import PageKey
from cached_attention.simulator.cost import Cost
from cached_attention.simulator.engine import Machine, Simulation
from cached_attention.simulator.policies import POLICIES
from cached_attention.simulator.replay import Replay
from cached_attention.simulator.request import Outcome, Request
from cached_attention.simulator.trace import BLOCK, TraceError, read_trace
from cached_attention.simulator.workload import OnTime, Saturated
from cached_attention.units import format_size

SHOWN = ("ours", "ours-lru", "lru", "sglang", "fifo", "lfu", "slru", "s3-fifo", "t-lru", "optimum")
ON_ARRIVAL, ON_TIME = "on arrival", "on time"


class Cell(NamedTuple):
    """One simulation: a policy, a capacity of host memory (pages), and how requests arrive."""

    load: str
    queue: int
    """Requests that always wait; 0: none, or as they arrive."""
    capacity: int
    policy: str


@dataclass(frozen=True)
class Result:
    """What one simulation measured. Rates are shares of all pages of all prompts; times in seconds."""

    load: str
    capacity: int
    policy: str
    hit_rate: float
    device: float
    host: float
    disk: float
    ttft_mean: float
    ttft_p99: float
    disk_bytes: int
    """Bytes written to disk."""
    queue: float
    """Requests that waited, on average, including the one to run."""
    wanted: float
    """Distinct pages of their prompts."""
    seconds: float
    """CPU seconds of the simulation."""


def known_pages(requests: Sequence[Request], queue: int) -> float:
    """Average number of pages whose next user was among the next `queue` requests when they were last used."""
    last: dict[PageKey, int] = {}
    total = 0
    for place, request in enumerate(requests):
        for key in request.prompt_keys:
            apart = place - last.get(key, -math.inf)
            total += int(apart) if apart <= queue else 0
            last[key] = place
    return total / max(1, len(requests))


def simulate(args: argparse.Namespace, cell: Cell) -> Result:
    """Run one simulation, possibly in a separate process, which reads the trace itself."""
    requests = _requests(args.trace)
    cost = _cost(args)
    machine = Machine(
        cost,
        page_tokens=BLOCK,
        host_pages=cell.capacity,
        disk_pages=args.disk,
        device_pages=args.device,
        schedule=args.schedule_policy,
    )
    policy = POLICIES[cell.policy]
    started = time.process_time()
    if cell.load == ON_ARRIVAL:
        outcome = Replay(machine, policy, requests).run()
    else:
        workload = Saturated(requests, cell.queue) if cell.queue else OnTime(requests)
        outcome = Simulation(machine, policy, workload, requests).run()
    return _result(cell, outcome, cost, time.process_time() - started)


_TRACES: dict[Path, list[Request]] = {}


def _requests(path: Path) -> list[Request]:
    if path not in _TRACES:
        _TRACES[path] = read_trace(path)
    return _TRACES[path]


def _cost(args: argparse.Namespace) -> Cost:
    return Cost(
        prefill_token=args.slower / args.prefill_rate,
        prefill_base=args.slower * Cost.prefill_base,
        decode_base=args.slower * Cost.decode_base,
        decode_request=args.slower * Cost.decode_request,
        batch=args.batch,
        page_bytes=args.kv_bytes * BLOCK,
        disk_read=args.disk_read * 1e9,
        disk_write=args.disk_write * 1e9,
    )


def _result(cell: Cell, outcome: Outcome, cost: Cost, seconds: float) -> Result:
    served = outcome.served
    pages = sum(one.request.prompt_pages for one in served)
    tiers = (
        np.array([(one.hits.device, one.hits.host, one.hits.ahead + one.hits.disk) for one in served]).sum(axis=0)
        / pages
    )
    times = np.array([one.ttft for one in served])
    return Result(
        load=cell.load,
        capacity=cell.capacity,
        policy=cell.policy,
        hit_rate=float(tiers.sum()),
        device=float(tiers[0]),
        host=float(tiers[1]),
        disk=float(tiers[2]),
        ttft_mean=float(times.mean()),
        ttft_p99=float(np.percentile(times, 99)),
        disk_bytes=outcome.written_pages * cost.page_bytes,
        queue=float(np.mean([one.queue for one in served])),
        wanted=float(np.mean([one.wanted for one in served])),
        seconds=seconds,
    )


def gap_closed(result: Result, results: Sequence[Result]) -> float:
    """Share of the gap between LRU and the optimum, at the same load and capacity; NaN if either is unknown."""
    bounds = {
        other.policy: other.hit_rate
        for other in results
        if (other.load, other.capacity) == (result.load, result.capacity)
    }
    gap = bounds.get("optimum", math.nan) - bounds.get("lru", math.nan)
    return (result.hit_rate - bounds["lru"]) / gap if gap > 0 else math.nan


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trace", type=Path, required=True, help="JSONL in Mooncake's format")
    parser.add_argument(
        "--capacity", type=int, nargs="+", required=True, help="host memory, in blocks of 512 tokens"
    )
    parser.add_argument("--policies", nargs="+", choices=tuple(POLICIES), default=list(SHOWN), metavar="POLICY")
    parser.add_argument("--queue", type=int, nargs="+", default=[], help="requests that wait at all times")
    parser.add_argument(
        "--slower", type=float, help="times that service takes; requests come when the trace says"
    )
    parser.add_argument("--schedule-policy", choices=("fcfs", "lpm"), default="fcfs")
    sizes = parser.add_argument_group("machine")
    sizes.add_argument("--device", type=int, default=0, help="blocks that the device keeps between turns")
    sizes.add_argument("--disk", type=int, default=0, help="blocks on disk")
    sizes.add_argument("--disk-read", type=float, default=5.0, help="GB/s")
    sizes.add_argument("--disk-write", type=float, default=2.0, help="GB/s")
    sizes.add_argument("--kv-bytes", type=int, default=1 << 17, help="of KV per token")
    sizes.add_argument("--prefill-rate", type=float, default=40_000, help="tokens per second")
    sizes.add_argument("--batch", type=int, default=64, help="requests that run at once")
    parser.add_argument("--workers", type=int, default=1, help="processes")
    parser.add_argument("--output", type=Path, default=Path("out/policy"), help="of .json and .png")
    args = parser.parse_args(arguments)
    if min(args.capacity) < 1 or min(args.queue, default=1) < 1:
        parser.error("--capacity and --queue must be at least 1")
    if args.queue and args.slower:
        parser.error("give either --queue or --slower")
    if "optimum" in args.policies and (args.disk or args.schedule_policy != "fcfs"):
        args.policies.remove("optimum")  # It needs the execution order in advance, and knows one tier only.
    args.load = ON_TIME if args.slower else "queue" if args.queue else ON_ARRIVAL
    args.slower = args.slower or 1.0
    return args


def _cells(args: argparse.Namespace) -> Iterator[Cell]:
    for queue in args.queue or [0]:
        load = f"queue {queue}" if queue else args.load
        for capacity in args.capacity:
            for policy in args.policies:
                yield Cell(load, queue, capacity, policy)


def main(arguments: Sequence[str] | None = None) -> int:
    args = parse(arguments)
    try:
        requests = _requests(args.trace)
    except (OSError, TraceError) as failure:
        print(f"policy: {failure}", file=sys.stderr)
        return 1
    _report(args, _measure(args), requests)
    return 0


def _measure(args: argparse.Namespace) -> list[Result]:
    cells = list(_cells(args))
    bar = partial(tqdm, total=len(cells), desc="simulations", unit="run")
    if args.workers == 1:
        return [simulate(args, cell) for cell in bar(cells)]
    with ProcessPoolExecutor(args.workers) as pool:
        return list(bar(pool.map(partial(simulate, args), cells)))


def _report(args: argparse.Namespace, results: Sequence[Result], requests: Sequence[Request]) -> None:
    console = Console()
    queues = {f"queue {queue}": queue for queue in args.queue}
    known = {load: known_pages(requests, queue) for load, queue in queues.items()}
    for load in dict.fromkeys(result.load for result in results):
        chosen = [result for result in results if result.load == load]
        console.print(_table(chosen, _title(load, chosen[0], known)))
    content = {
        "parameters": vars(args) | {"trace": args.trace.name, "output": args.output.name},
        "date": time.strftime("%Y-%m-%d"),
        "command": _command(args),
        "machine": machine(),
        "known_pages": known,
        "results": [asdict(one) | {"gap_closed": _or_none(gap_closed(one, results))} for one in results],
    }
    args.output.parent.mkdir(parents=True, exist_ok=True)
    args.output.with_suffix(".json").write_text(json.dumps(content, indent=1, default=str) + "\n")
    _save_figure(args.output.with_suffix(".png"), results)
    console.print(f"saved {args.output.with_suffix('.json')} and {args.output.with_suffix('.png')}")


def _or_none(number: float) -> float | None:
    return None if math.isnan(number) else number


def _command(args: argparse.Namespace) -> str:
    words = ["python -m benchmark.policy --trace", args.trace.name, "--capacity", *map(str, args.capacity)]
    words += ["--policies", *args.policies]
    words += ["--queue", *map(str, args.queue)] if args.queue else []
    words += ["--slower", str(args.slower)] if args.load == ON_TIME else []
    words += ["--disk", str(args.disk)] if args.disk else []
    return " ".join(words)


def _title(load: str, result: Result, known: dict[str, float]) -> str:
    if load == ON_ARRIVAL:
        return "Requests run on arrival"
    words = f"Under load: {result.queue:.0f} requests wait on average and want {result.wanted:,.0f} pages"
    return f"{words}, {known[load]:,.0f} of them known" if load in known else words


def _table(results: Sequence[Result], title: str) -> Table:
    table = Table(title=title, title_justify="left")
    tiers = [name for name in ("device", "host", "disk") if any(getattr(one, name) for one in results)]
    tiers = tiers if len(tiers) > 1 else []
    for name in ("pages", "policy", "hit rate", "of gap", *tiers, "TTFT", "P99", "written"):
        table.add_column(name, justify="left" if name == "policy" else "right", no_wrap=True)
    for place, one in enumerate(results):
        if place and results[place - 1].capacity != one.capacity:
            table.add_section()
        closed = gap_closed(one, results)
        table.add_row(
            f"{one.capacity:,}",
            POLICIES[one.policy].label,
            f"{one.hit_rate:.4f}",
            "" if math.isnan(closed) else f"{closed:.0%}",
            *(f"{getattr(one, tier):.1%}" for tier in tiers),
            *(f"{seconds:.2f} s" for seconds in (one.ttft_mean, one.ttft_p99)),
            format_size(one.disk_bytes) if one.disk_bytes else "",
        )
    return table


STYLES: dict[str, dict[str, Any]] = {
    "optimum": {"color": "#333333", "linestyle": "--"},
    "ours": {"color": "#0072b2", "linewidth": 2.5},
    "ours-lru": {"color": "#56b4e9", "linewidth": 2},
    "lru": {"color": "#8c8c8c", "linewidth": 2},
    "sglang": {"color": "#e69f00"},
    "fifo": {"color": "#cc79a7"},
    "lfu": {"color": "#d55e00"},
    "slru": {"color": "#009e73"},
    "s3-fifo": {"color": "#b5a300"},
    "t-lru": {"color": "#7f3c8d"},
}


def _save_figure(path: Path, results: Sequence[Result]) -> None:
    loads = list(dict.fromkeys(result.load for result in results))
    figure = Figure(figsize=(2.5 + 4 * len(loads), 4.4), layout="constrained")
    for place, (axes, load) in enumerate(
        zip(np.atleast_1d(figure.subplots(1, len(loads), sharey=True)), loads, strict=True)
    ):
        for policy in dict.fromkeys(result.policy for result in results):
            chosen = [one for one in results if (one.load, one.policy) == (load, policy)]
            sizes, rates = [one.capacity for one in chosen], [one.hit_rate for one in chosen]
            style = STYLES.get(policy, {"color": "#a6a6a6"})
            axes.plot(sizes, rates, marker="o", markersize=3.5, label=POLICIES[policy].label, **style)
        axes.set(title=load, xlabel="host memory, blocks of 512 tokens", xscale="log", ylim=(0, None))
        axes.set_xticks(sorted({one.capacity for one in results}))
        axes.xaxis.set_major_formatter(ScalarFormatter())
        axes.xaxis.set_minor_locator(NullLocator())
        axes.yaxis.set_major_formatter(PercentFormatter(1.0))
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(axis="y", color="#e6e6e6")
        if not place:
            axes.set_ylabel("hit rate, of all blocks")
    figure.legend(*axes.get_legend_handles_labels(), loc="outside right center", frameon=False)
    figure.savefig(path, dpi=150)


if __name__ == "__main__":
    sys.exit(main())
