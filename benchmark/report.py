"""Tables for the terminal and the JSON file of a benchmark."""

from __future__ import annotations

import json
import platform
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import psutil
from rich.table import Table

from benchmark.client import Round
from benchmark.summary import (
    COMPUTED,
    Agreement,
    Summary,
    agreement,
    by_configuration,
    median_throughput,
    paired_ratios,
    summarise,
)

SHOWN_MISMATCHES = 5
PACKAGES = ("sglang", "sglang-cached-attention", "torch")


def multiturn_table(summaries: Sequence[Summary], agreements: Sequence[Agreement]) -> Table:
    """Metrics as rows, configurations as columns; the first configuration is the reference of the ratios."""
    reference = summaries[0]
    table = Table(title=f"Returning turns ({reference.turns} per configuration)", title_justify="left")
    table.add_column("")
    for summary in summaries:
        table.add_column(summary.configuration, justify="right")

    def add(label: str, value: Callable[[Summary], str]) -> None:
        table.add_row(label, *(value(summary) for summary in summaries))

    add("TTFT mean", lambda s: _seconds(s.ttft.mean))
    add("TTFT P50", lambda s: _seconds(s.ttft.p50))
    add("TTFT P99", lambda s: _seconds(s.ttft.p99))
    if len(summaries) > 1:
        add(f"speed-up over {reference.configuration}", lambda s: f"{reference.ttft.mean / s.ttft.mean:.2f}x")
    add("end to end, mean", lambda s: _seconds(s.e2e.mean))
    add("inter-token, mean", lambda s: _seconds(s.itl.mean))
    add("inter-token, P99", lambda s: _seconds(s.itl.p99))
    add("first turn TTFT, mean", lambda s: _seconds(s.first_turn_ttft.mean))
    add("input, all turns", lambda s: f"{s.input_throughput:.1f} tok/s")
    add("output, all turns", lambda s: f"{s.output_throughput:.1f} tok/s")
    table.add_section()
    for tier in tiers(summaries):
        add("prompt computed" if tier == COMPUTED else f"prompt from {tier}", _share_of(tier))
    if not agreements:
        return table
    table.add_section()
    counts = {one.configuration: f"{len(one.mismatches)} of {one.compared}" for one in agreements}
    add("answers that differ", lambda s: counts.get(s.configuration, "reference"))
    return table


def zero_hit_table(rounds: Sequence[Round]) -> Table:
    """Medians over the rounds; ratios are relative to the first configuration in the same round."""
    groups = by_configuration(rounds)
    reference = next(iter(groups))
    table = Table(title=f"Distinct prompts ({len(groups[reference])} rounds)", title_justify="left")
    table.add_column("")
    for name in groups:
        table.add_column(name, justify="right")

    def add(label: str, value: Callable[[list[Round]], str]) -> None:
        table.add_row(label, *(value(group) for group in groups.values()))

    def ratios(group: list[Round]) -> list[float]:
        return paired_ratios(group, groups[reference])

    def differing(group: list[Round]) -> str:
        result = agreement(group, groups[reference])
        return f"{len(result.mismatches)} of {result.compared}"

    add("throughput, median", lambda group: f"{median_throughput(group):.1f} tok/s")
    add(f"ratio to {reference}, median", lambda group: f"{statistics.median(ratios(group)):.3f}x")
    add("lowest and highest ratio", lambda group: f"{min(ratios(group)):.3f}x, {max(ratios(group)):.3f}x")
    add("TTFT P50", lambda group: _seconds(summarise(group, first_measured_turn=0).ttft.p50))
    add("answers that differ", lambda group: "reference" if group is groups[reference] else differing(group))
    return table


def mismatch_lines(agreements: Sequence[Agreement]) -> list[str]:
    """The first differing answers of each configuration, as text."""
    lines = []
    for one in agreements:
        for miss in one.mismatches[:SHOWN_MISMATCHES]:
            place = f"round {miss.round}, conversation {miss.conversation}, turn {miss.turn}"
            lines.append(f"{one.configuration}: {place}: answers differ from token {miss.position} on")
        if hidden := len(one.mismatches) - SHOWN_MISMATCHES:
            lines += [f"{one.configuration}: and {hidden} more"] if hidden > 0 else []
    return lines


def tiers(summaries: Sequence[Summary]) -> list[str]:
    """Tiers that served any prompt token, as the server names them, fastest first and "computed" last."""
    order = {"device": 0, "host": 1, "disk": 2, "remote": 3, "storage": 4, COMPUTED: 9}
    seen = {tier for summary in summaries for tier in summary.origin}
    return sorted(seen, key=lambda tier: (order.get(tier, 5), tier))


def write_json(
    path: Path, parameters: Mapping[str, Any], rounds: Sequence[Round], **sections: Sequence[Any]
) -> None:
    """Write parameters, summaries and records, with versions and machine."""
    content = {
        "parameters": dict(parameters),
        "machine": machine(),
        **{name: [asdict(value) for value in values] for name, values in sections.items()},
        "rounds": [asdict(one) for one in rounds],
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, indent=1, default=str) + "\n")


def machine() -> dict[str, Any]:
    """Versions of the measured packages, and the size of the machine."""
    return {
        "packages": {name: _version(name) for name in PACKAGES},
        "python": platform.python_version(),
        "processor": platform.machine(),
        "cores": psutil.cpu_count(),
        "memory_gib": round(psutil.virtual_memory().total / 2**30, 1),
    }


def _share_of(tier: str) -> Callable[[Summary], str]:
    return lambda summary: f"{summary.origin.get(tier, 0.0):.1%}"


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _seconds(value: float) -> str:
    return f"{value:.2f} s" if value >= 1 else f"{value * 1000:.1f} ms"
