"""Do the tiers reach the bandwidth of memory and disk, and what does their index cost?

    python -m benchmark.tiers [--directory DIR] [--output DIR] [--encryption]

- host: save and load between a device pool in ordinary memory and the arena, compared with one memcpy of the same
  bytes.
- disk: fill (new space), write (space used before) and read, compared with plain pwritev, preadv and fdatasync
  calls of the same size and depth on the same file system, bypassing the page cache where possible.
- encrypted, with --encryption: the disk tier with encryption compared with the same without, and opening such a
  store.
- open: seconds and peak memory until a server knows every page of a store, in a separate process.
- index: operations per second.

The two sides of a comparison alternate, and the ratio is the median of the rounds' ratios. DIR is emptied.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from itertools import product
from pathlib import Path
from typing import Any

import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Table
from tqdm import tqdm

from benchmark.index_speed import IndexSpeed, measure_index
from benchmark.opening import CHAIN, Opening, make_store, measure
from benchmark.report import machine
from benchmark.throughput import Comparison, DiskBench, EncryptionBench, HostBench, ModelShape
from cached_attention.permissions import make_private

BOUNDS = {"host": 0.85, "disk": 0.90, "encrypted": 0.60}
"""Lowest ratio to the raw limit, or to the disk tier without encryption."""
AGAINST = {"host": "one memcpy", "disk": "plain preadv and pwritev", "encrypted": "the same tier in the clear"}
BOUND_FROM = 1 << 20
"""Bytes of a page; smaller pages have no bound."""
MOST_OPENING_S = 5.0
MOST_BYTES_PER_PAGE = 300
BOUND_PAGES = 1_000_000
INDEX_OPERATIONS = 20_000
COLOURS = {"save": "#0072b2", "load": "#009e73", "fill": "#cc79a7", "write": "#0072b2", "read": "#009e73"}


@dataclass
class Result:
    direct: bool = True
    """Whether disk I/O bypassed the page cache."""
    comparisons: list[Comparison] = field(default_factory=list)
    openings: list[Opening] = field(default_factory=list)
    index: list[IndexSpeed] = field(default_factory=list)


def measure_host(args: argparse.Namespace, result: Result) -> None:
    for page_tokens in args.page_sizes:
        _compete(HostBench(args.shape, page_tokens, args.bytes), "host", page_tokens, args.rounds, result)


def measure_disk(args: argparse.Namespace, result: Result) -> None:
    benches: dict[str, type[DiskBench | EncryptionBench]] = {"disk": DiskBench}
    if args.encryption:
        benches["encrypted"] = EncryptionBench
    for (tier, make), page_tokens in product(benches.items(), args.page_sizes):
        make_private(args.directory)
        bench = make(args.directory, args.shape, page_tokens, args.bytes)
        try:
            _compete(bench, tier, page_tokens, args.rounds, result)
        finally:
            bench.close()
            shutil.rmtree(args.directory, ignore_errors=True)
        result.direct = bench.direct


def _compete(
    bench: HostBench | DiskBench | EncryptionBench, tier: str, page_tokens: int, rounds: int, result: Result
) -> None:
    for direction, contest in bench.contests().items():
        comparison = Comparison(tier, direction, page_tokens, bench.page_bytes, bench.moved_bytes)
        name = f"{tier} {direction}, {page_tokens} tokens"
        for _ in tqdm(contest.run(comparison, rounds), name, rounds + 1, unit="round", leave=False):
            pass
        result.comparisons.append(comparison)


def measure_openings(args: argparse.Namespace, result: Result) -> None:
    kinds = (False, True) if args.encryption else (False,)
    for encrypted, pages in product(kinds, args.store_pages):
        make_store(args.directory, pages, encrypted=encrypted)
        for _ in tqdm(range(args.openings), f"opening {pages:,} pages", unit="round", leave=False):
            result.openings.append(measure(args.directory, pages, encrypted))
        shutil.rmtree(args.directory)


def measure_indexes(args: argparse.Namespace, result: Result) -> None:
    for pages in tqdm(args.store_pages, "index", unit="size", leave=False):
        result.index += measure_index(pages, min(INDEX_OPERATIONS, pages), args.rounds)


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--directory", type=Path, default=Path("out/tiers-disk"), help="on the disk to measure")
    parser.add_argument("--output", type=Path, default=Path("out"), help="where tiers.json and tiers.png go")
    parser.add_argument("--page-sizes", type=int, nargs="+", default=[16, 32, 64, 128, 256], help="tokens")
    parser.add_argument("--bytes", type=int, default=1 << 30, help="moved per round: more than the caches hold")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--encryption", action="store_true", help="measure the encrypted disk tier as well")
    parser.add_argument("--openings", type=int, default=3, help="of each store")
    parser.add_argument("--store-pages", type=int, nargs="+", default=[100_000, 1_000_000])
    parser.add_argument("--layers", type=int, default=32, help="the default is the shape of Llama-3-8B")
    parser.add_argument("--kv-heads", type=int, default=8)
    parser.add_argument("--head-dim", type=int, default=128)
    parser.add_argument("--dtype-bytes", type=int, default=2)
    args = parser.parse_args(arguments)
    args.shape = ModelShape(args.layers, args.kv_heads, args.head_dim, args.dtype_bytes)
    most = max(args.page_sizes) * args.shape.token_bytes
    if args.bytes < most:
        parser.error(f"--bytes is {args.bytes:,}; the largest page has {most:,}: give at least that.")
    return args


def main(arguments: Sequence[str] | None = None) -> int:
    args = parse(arguments)
    torch.set_num_threads(1)
    result = Result()
    shutil.rmtree(args.directory, ignore_errors=True)
    try:
        measure_host(args, result)
        measure_disk(args, result)
        measure_openings(args, result)
        measure_indexes(args, result)
    finally:
        shutil.rmtree(args.directory, ignore_errors=True)
    console = Console()
    for table in (throughput_table(args.shape, result), opening_table(result), index_table(result)):
        console.print(table)
    if not result.direct:
        console.print("The file system refuses O_DIRECT: the disk's numbers include the page cache.")
    args.output.mkdir(parents=True, exist_ok=True)
    write_json(args.output / "tiers.json", args, result)
    save_figure(args.output / "tiers.png", args.shape, result)
    console.print(f"saved {args.output / 'tiers.json'} and {args.output / 'tiers.png'}")
    return 0


def throughput_table(shape: ModelShape, result: Result) -> Table:
    table = Table(title=f"Throughput of one rank; {shape}", title_justify="left")
    for name in (
        "tier",
        "",
        "page, tokens",
        "bytes",
        "ours, GB/s",
        "raw, GB/s",
        "ratio",
        "lowest, highest",
        "bound",
    ):
        table.add_column(name, justify="left" if name in ("tier", "") else "right")
    before = None
    for one in result.comparisons:
        if before not in (None, one.tier):
            table.add_section()
        before = one.tier
        speeds = [f"{speed / 1e9:.2f}" for speed in (one.ours_bytes_per_s, one.raw_bytes_per_s)]
        spread = f"{min(one.ratios):.2f}, {max(one.ratios):.2f}"
        bound = BOUNDS[one.tier] if one.page_bytes >= BOUND_FROM else None
        held = "" if bound is None else _verdict(one.ratio >= bound, f">= {bound:.2f}x")
        size = f"{one.page_bytes / 2**20:g} MiB"
        table.add_row(
            one.tier, one.direction, str(one.page_tokens), size, *speeds, f"{one.ratio:.3f}x", spread, held
        )
    return table


def opening_table(result: Result) -> Table:
    table = Table(title=f"Opening a store, medians; chains of {CHAIN} pages", title_justify="left")
    for name in ("pages", "disk tier", "and the index", "together", "bytes per page at the peak", "bound"):
        table.add_column(name, justify="right")
    for pages, encrypted in dict.fromkeys((one.pages, one.encrypted) for one in result.openings):
        some = [one for one in result.openings if (one.pages, one.encrypted) == (pages, encrypted)]
        seconds = statistics.median(one.seconds for one in some)
        size = statistics.median(one.bytes_per_page for one in some)
        parts = [
            statistics.median(parts) for parts in zip(*((one.tier_s, one.store_s) for one in some), strict=True)
        ]
        within = seconds <= MOST_OPENING_S and size <= MOST_BYTES_PER_PAGE
        bound = f"<= {MOST_OPENING_S:g} s, {MOST_BYTES_PER_PAGE} bytes"
        held = _verdict(within, bound) if pages >= BOUND_PAGES and not encrypted else ""
        name = f"{pages:,}, encrypted" if encrypted else f"{pages:,}"
        table.add_row(name, *(f"{part:.2f} s" for part in (*parts, seconds)), f"{size:.0f}", held)
    return table


def index_table(result: Result) -> Table:
    table = Table(title="Index operations per second, one thread", title_justify="left")
    sizes = list(dict.fromkeys(one.pages for one in result.index))
    table.add_column("")
    for pages in sizes:
        table.add_column(f"{pages:,} pages", justify="right")
    for operation in dict.fromkeys(one.operation for one in result.index):
        speeds = {one.pages: one.per_second for one in result.index if one.operation == operation}
        table.add_row(operation, *(f"{speeds[pages]:,.0f}" for pages in sizes))
    return table


def _verdict(held: bool, bound: str) -> str:
    return f"[green]{bound} holds[/]" if held else f"[red]{bound} missed[/]"


def write_json(path: Path, args: argparse.Namespace, result: Result) -> None:
    measured = ("page_sizes", "bytes", "rounds", "openings", "store_pages")
    content: dict[str, Any] = {
        "command": "python -m benchmark.tiers",
        "parameters": {name: getattr(args, name) for name in measured},
        "date": time.strftime("%Y-%m-%d"),
        "machine": machine(),
        "shape": asdict(args.shape),
        "direct": result.direct,
        "throughput": [asdict(one) | {"ratio": one.ratio} for one in result.comparisons],
        "openings": [asdict(one) for one in result.openings],
        "index": [asdict(one) for one in result.index],
    }
    path.write_text(json.dumps(content, indent=1) + "\n")


def save_figure(path: Path, shape: ModelShape, result: Result) -> None:
    """Ratios to the raw limit by page size, with the spread of the rounds and the bounds."""
    figure = Figure(figsize=(15, 4.2), layout="constrained")
    tiers = list(dict.fromkeys(one.tier for one in result.comparisons))
    for axes, tier in zip(figure.subplots(1, len(tiers), sharey=True), tiers, strict=True):
        _ratios(axes, tier, [one for one in result.comparisons if one.tier == tier])
    top = max((max(one.ratios) for one in result.comparisons), default=1.0)
    figure.axes[0].set_ylim(0, 1.05 * max(top, 1.0))
    figure.suptitle(f"Throughput against the raw limit; {shape}", fontsize=10)
    figure.savefig(path, dpi=150)


def _ratios(axes: Axes, tier: str, comparisons: Sequence[Comparison]) -> None:
    groups: dict[str, list[Comparison]] = {}
    for one in comparisons:
        groups.setdefault(one.direction, []).append(one)
    sizes = list(dict.fromkeys(one.page_tokens for one in comparisons))
    width = 0.8 / max(len(groups), 1)
    for number, (direction, group) in enumerate(groups.items()):
        places = [sizes.index(one.page_tokens) + (number - (len(groups) - 1) / 2) * width for one in group]
        middle = [one.ratio for one in group]
        spread = [
            [one.ratio - min(one.ratios) for one in group],
            [max(one.ratios) - one.ratio for one in group],
        ]
        axes.bar(places, middle, width * 0.9, color=COLOURS[direction], label=direction)
        axes.errorbar(places, middle, spread, fmt="none", ecolor="#333333", elinewidth=1)
    axes.axhline(1.0, color="#8c8c8c", linewidth=1)
    axes.axhline(BOUNDS[tier], color="#d55e00", linestyle="--", label=f"bound, {BOUNDS[tier]:.2f}x")
    axes.set(title=f"{tier}, against {AGAINST[tier]}", xlabel="page, tokens", ylabel="ratio")
    axes.set_xticks(range(len(sizes)), [str(size) for size in sizes])
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, loc="upper center", bbox_to_anchor=(0.5, -0.15), ncols=4)


if __name__ == "__main__":
    sys.exit(main())
