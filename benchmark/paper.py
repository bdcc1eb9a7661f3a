"""The paper's own setup in virtual time: four models, 9,000 ShareGPT-like sessions, 128 GB of DRAM, 10 TB of SSD.

    python -m benchmark.paper                          # all four, a quarter of the size
    python -m benchmark.paper --models 13B --think 10 60 300 --policies ours fetching-lru fetching-fifo

What the paper states is in `Shape` and `MODELS`. What it does not state is a parameter here, and is reported: the
time between turns (--think), the share of the answer in a turn, the speed of the SSD, how fast a model decodes,
and how much slower than that the machine is overall (--slower). The prefill time per token is scaled from the one
that is stated (65B on four A100: 360 ms for 2,000 tokens) by the number of parameters and GPUs.

`--scale 0.25` simulates a quarter of everything: sessions, arrivals, memory, disk, bandwidth, and a machine with
a quarter of the speed and batch. Times are given for full size.

A turn is a hit if all whole pages of its history were found: `hits`. The paper's unit is the whole session, which
is found or not; here only the last page may be missing, so `partly` counts each turn by the share that was found.
TTFT is measured from the start of the prefill, like the paper's figures, which are the inverse of its prefill
throughput.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter
from rich.console import Console
from rich.table import Table
from tqdm import tqdm

from benchmark.report import machine
from cached_attention.simulator.conversations import Conversations, Shape
from cached_attention.simulator.cost import Cost
from cached_attention.simulator.engine import Machine, Simulation
from cached_attention.simulator.policies import POLICIES
from cached_attention.simulator.request import Outcome

DRAM, SSD = 128e9, 10e12
"""Bytes."""
TTL = 3600.0
WARM_UP = 10_000
"""Turns that are not measured."""
BATCH = 24
PCIE = 26e9
HBM = 1.6e12
"""Bytes per second that decoding achieves on one A100. Not stated."""
PREFILL = 360e-3 / 2000 * 4 / 65e9
"""Seconds per token, parameter and 1 / GPU: section 2.3 of the paper."""
GPU_PRICE, STORAGE_PRICE = 5.0, 128 * 0.0088 + 10240 * 0.000082
"""Dollars per hour."""


@dataclass(frozen=True)
class Model:
    """A model of the paper's evaluation, and the results reported for it."""

    name: str
    parameters: float
    gpus: int
    """For 13B inferred from its cost saving, which fits two; for the others four fit."""
    kv: float
    """Bytes per token."""
    context: int
    layers: int
    hit_rate: float
    ttft: float
    """Share by which it was reduced."""
    throughput: float
    gpu_time: float
    saving: float

    def cost(self, page_tokens: int, disk: float, scale: float, slower: float) -> Cost:
        """Cost model of the machine at `scale` of its size; `disk`: bytes per second in each direction."""
        hbm = HBM * self.gpus / slower
        return Cost(
            prefill_token=slower * PREFILL * self.parameters / self.gpus / scale,
            prefill_base=0.0,
            decode_base=2 * self.parameters / hbm,
            decode_request=self.kv * self.context / 2 / hbm / scale,
            batch=max(1, round(BATCH * scale)),
            page_bytes=round(self.kv * page_tokens),
            layers=self.layers,
            host_bandwidth=PCIE * scale,
            disk_read=disk * scale,
            disk_write=disk * scale,
        )


MODELS = {
    model.name: model
    for model in (
        Model("13B", 13e9, 2, 0.78e6, 4096, 40, 0.86, 0.85, 6.8, 4.0, 0.70),
        Model("65B", 65e9, 4, 2.5e6, 2048, 80, 0.71, 0.61, 2.6, 1.9, 0.43),
        Model("70B", 70e9, 4, 0.31e6, 4096, 80, 0.89, 0.87, 7.8, 3.3, 0.66),
        Model("Falcon-40B", 40e9, 4, 0.12e6, 2048, 60, 0.90, 0.86, 7.2, 3.4, 0.68),
    )
}
PAPER_EVICTION = {"ours": 0.86, "fetching-lru": 0.58, "fetching-fifo": 0.48}
"""Reported hit rates of 13B at 128 GB and 10 TB."""


@dataclass(frozen=True)
class Result:
    """One simulation, without the warm-up; times in seconds of the machine at full size."""

    model: str
    think: float
    policy: str
    hit_rate: float
    """Share of turns for which all whole pages of the history were found."""
    partly: float
    """Share of the history that was found, on average over all turns; 0 without a history."""
    possible: float
    """Share of turns that have a history."""
    in_time: float
    """Share of the pages found that were in host memory when the turn was first due to run."""
    ttft: float
    prefill_throughput: float
    """Prompt tokens per second of prefill."""
    gpu_time: float
    """Seconds in which the machine was busy, including the warm-up."""
    queue: float
    """Turns that waited, on average, scaled to a machine of full size."""
    wait: float
    seconds: float
    """CPU seconds of the simulation."""


def simulate(args: argparse.Namespace, model: Model, think: float, policy: str) -> Result:
    """One run of the whole workload."""
    started = time.process_time()
    tokens, scale = args.page_size, args.scale
    shape = Shape(
        sessions=round(args.sessions * scale),
        rate=args.rate * scale,
        context=model.context,
        think=think,
        answer=args.answer,
    )
    pages = scale / (model.kv * tokens)
    size = Machine(
        model.cost(tokens, args.ssd * 1e9, scale, args.slower),
        tokens,
        host_pages=int(DRAM * pages),
        disk_pages=int(SSD * pages),
        ttl=TTL,
    )
    outcome = Simulation(size, POLICIES[policy], Conversations(shape, tokens, args.seed)).run()
    return _result(outcome, (model.name, think, policy), args, time.process_time() - started)


def _result(outcome: Outcome, cell: tuple[str, float, str], args: argparse.Namespace, seconds: float) -> Result:
    measured = outcome.served[round(WARM_UP * args.scale) :]
    histories = [one.request.history // args.page_size for one in measured]
    found = [min(one.hits.pages, pages) for one, pages in zip(measured, histories, strict=True)]
    returning = [one.request.history > 0 for one in measured]
    parts = list(zip(found, histories, returning, strict=True))
    hits = [have and one == pages for have, one, pages in zip(returning, found, histories, strict=True)]
    late = sum(one.hits.disk for one in measured)
    prefill = np.array([one.prefill for one in measured]) * args.scale
    return Result(
        *cell,
        hit_rate=float(np.mean(hits)),
        partly=float(np.mean([one / pages if pages else have for one, pages, have in parts])),
        possible=float(np.mean(returning)),
        in_time=1 - late / max(1, sum(found)),
        ttft=float(prefill.mean()),
        prefill_throughput=sum(one.request.prompt for one in measured) / float(prefill.sum()),
        gpu_time=outcome.busy,
        queue=float(np.mean([one.queue for one in measured])) / args.scale,
        wait=float(np.mean([one.started - one.request.arrival for one in measured])),
        seconds=seconds,
    )


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=tuple(MODELS), default=list(MODELS))
    parser.add_argument("--policies", nargs="+", choices=tuple(POLICIES), default=["ours", "none"])
    parser.add_argument("--scale", type=float, default=0.25, help="of sessions, machine and tiers")
    parser.add_argument("--sessions", type=int, default=9000)
    parser.add_argument("--rate", type=float, default=1.0, help="sessions that begin per second")
    parser.add_argument("--page-size", type=int, default=128, help="tokens")
    parser.add_argument("--seed", type=int, default=0)
    unstated = parser.add_argument_group("what the paper does not state")
    unstated.add_argument("--think", type=float, nargs="+", default=[60.0], help="mean seconds between turns")
    unstated.add_argument("--answer", type=float, default=0.6, help="part of a turn's tokens")
    unstated.add_argument("--slower", type=float, default=1.0, help="times that prefill and decoding take")
    unstated.add_argument("--ssd", type=float, default=5.0, help="GB/s, each way")
    parser.add_argument("--workers", type=int, default=1, help="processes")
    parser.add_argument("--output", type=Path, default=Path("out/paper"), help="of .json and .png")
    args = parser.parse_args(arguments)
    if not 0 < args.scale <= 1 or min(args.think) <= 0:
        parser.error("--scale must be above 0 and at most 1, --think above 0")
    return args


def main(arguments: Sequence[str] | None = None) -> int:
    args = parse(arguments)
    cells = [(MODELS[m], think, policy) for m in args.models for think in args.think for policy in args.policies]
    bar = partial(tqdm, total=len(cells), desc="simulations", unit="run")
    if args.workers == 1:
        results = [simulate(args, *cell) for cell in bar(cells)]
    else:
        with ProcessPoolExecutor(args.workers) as pool:
            results = list(bar(pool.map(partial(simulate, args), *zip(*cells, strict=True))))
    _report(args, results)
    return 0


def _report(args: argparse.Namespace, results: Sequence[Result]) -> None:
    console = Console()
    console.print(_policies_table(results))
    if "none" in args.policies and "ours" in args.policies:
        console.print(_models_table(results))
    content = {
        "parameters": vars(args) | {"output": args.output.name},
        "date": time.strftime("%Y-%m-%d"),
        "command": "python -m benchmark.paper " + _arguments(args),
        "machine": machine(),
        "results": [asdict(result) for result in results],
    }
    args.output.parent.mkdir(parents=True, exist_ok=True)
    args.output.with_suffix(".json").write_text(json.dumps(content, indent=1, default=str) + "\n")
    _save_figure(args.output.with_suffix(".png"), results)
    console.print(f"saved {args.output.with_suffix('.json')} and {args.output.with_suffix('.png')}")


def _arguments(args: argparse.Namespace) -> str:
    words = ["--models", *args.models, "--policies", *args.policies, "--think", *map(str, args.think)]
    words += [
        "--scale",
        args.scale,
        "--rate",
        args.rate,
        "--answer",
        args.answer,
        "--ssd",
        args.ssd,
        "--slower",
        args.slower,
    ]
    return " ".join(map(str, words))


def _policies_table(results: Sequence[Result]) -> Table:
    table = Table(title="Hit rates of turns", title_justify="left")
    for name in ("model", "think", "policy", "hits", "paper", "partly", "possible", "in time", "queue", "wait"):
        table.add_column(name, justify="left" if name in ("model", "policy") else "right", no_wrap=True)
    for one in results:
        reported = PAPER_EVICTION.get(one.policy) if one.model == "13B" else None
        if one.policy == "ours":
            reported = MODELS[one.model].hit_rate
        table.add_row(
            one.model,
            f"{one.think:g} s",
            POLICIES[one.policy].label,
            f"{one.hit_rate:.1%}",
            f"{reported:.0%}" if reported else "",
            *(f"{share:.1%}" for share in (one.partly, one.possible, one.in_time)),
            f"{one.queue:,.0f}",
            f"{one.wait:,.0f} s",
        )
    return table


def _models_table(results: Sequence[Result]) -> Table:
    """Improvement over recomputing, each number beside the paper's."""
    table = Table(title="Against recomputing, and what the paper reports", title_justify="left")
    for name in ("model", "think", "TTFT", "paper", "prefill", "paper", "GPU time", "paper", "saving", "paper"):
        table.add_column(name, justify="left" if name == "model" else "right", no_wrap=True)
    by_cell = {(one.model, one.think, one.policy): one for one in results}
    for (name, think, policy), one in by_cell.items():
        if policy != "ours":
            continue
        model, other = MODELS[name], by_cell[name, think, "none"]
        speedup = other.gpu_time / one.gpu_time
        gpus = model.gpus * GPU_PRICE
        saving = 1 - (gpus + STORAGE_PRICE) / (speedup * gpus)
        table.add_row(
            name,
            f"{think:g} s",
            f"-{1 - one.ttft / other.ttft:.0%}",
            f"-{model.ttft:.0%}",
            f"{one.prefill_throughput / other.prefill_throughput:.1f}x",
            f"{model.throughput:.1f}x",
            f"{speedup:.1f}x",
            f"{model.gpu_time:.1f}x",
            f"{saving:.0%}",
            f"{model.saving:.0%}",
        )
    return table


COLOURS = {"ours": "#0072b2", "fetching-lru": "#8c8c8c", "fetching-fifo": "#cc79a7", "ours-lru": "#56b4e9"}


def _save_figure(path: Path, results: Sequence[Result]) -> None:
    """Hit rate by time between turns, with the paper's as dashed lines."""
    models = list(dict.fromkeys(one.model for one in results))
    figure = Figure(figsize=(1.5 + 3.2 * len(models), 4), layout="constrained")
    panels = np.atleast_1d(figure.subplots(1, len(models), sharey=True))
    for axes, model in zip(panels, models, strict=True):
        for policy in dict.fromkeys(one.policy for one in results if one.policy != "none"):
            chosen = [one for one in results if (one.model, one.policy) == (model, policy)]
            colour = COLOURS.get(policy, "#009e73")
            axes.plot(
                [one.think for one in chosen],
                [one.hit_rate for one in chosen],
                marker="o",
                color=colour,
                label=POLICIES[policy].label,
            )
            reported = MODELS[model].hit_rate if policy == "ours" else PAPER_EVICTION.get(policy)
            if reported and (model == "13B" or policy == "ours"):
                axes.axhline(reported, color=colour, linestyle="--", linewidth=1)
        axes.set(title=model, xlabel="mean seconds between turns", xscale="log", ylim=(0, 1))
        axes.yaxis.set_major_formatter(PercentFormatter(1.0))
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(axis="y", color="#e6e6e6")
    panels[0].set_ylabel("turns whose history was found")
    panels[-1].legend(frameon=False, loc="lower left")
    figure.savefig(path, dpi=150)


if __name__ == "__main__":
    sys.exit(main())
