"""Figures of a benchmark, written as PNG."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter

from benchmark.client import Round
from benchmark.report import tiers
from benchmark.summary import COMPUTED, Summary, by_configuration, paired_ratios, total_throughput

CONFIGURATION_COLOURS = {
    "stock": "#8c8c8c",
    "cached-attention": "#0072b2",
    "device": "#009e73",
    "hicache": "#e69f00",
    "server": "#0072b2",
}
TIER_COLOURS = {
    "device": "#009e73",
    "host": "#0072b2",
    "storage": "#e69f00",
    "remote": "#cc79a7",
    COMPUTED: "#d9d9d9",
}
OTHER_COLOUR = "#56b4e9"


def save_multiturn(path: Path, rounds: Sequence[Round], summaries: Sequence[Summary]) -> None:
    """TTFT by turn and configuration, and where the prompt tokens of the returning turns came from."""
    figure = Figure(figsize=(10.5, 4.4), layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=(3, 2))
    _ttft_by_turn(left, by_configuration(rounds))
    _origins(right, summaries)
    _save(figure, path)


def save_zero_hit(path: Path, rounds: Sequence[Round]) -> None:
    """Throughput of every round, and its ratio to the first configuration within the same round."""
    figure = Figure(figsize=(10.5, 4.4), layout="constrained")
    left, right = figure.subplots(1, 2)
    groups = by_configuration(rounds)
    reference = next(iter(groups))
    for name, group in groups.items():
        ordered = sorted(group, key=lambda one: one.index)
        places = [one.index + 1 for one in ordered]
        style = {"marker": "o", "color": _colour(name), "label": name}
        left.plot(places, [total_throughput(one) for one in ordered], **style)
        if name != reference:
            ratios = paired_ratios(ordered, groups[reference])
            right.plot(places, ratios, **style)
            right.axhline(statistics.median(ratios), color=_colour(name), linestyle="--", label=f"{name}, median")
    left.set(title="Throughput, distinct prompts", xlabel="round", ylabel="tokens per second", ylim=(0, None))
    right.axhline(1.0, color=_colour("stock"), linewidth=1)
    right.set(title=f"Ratio to {reference}", xlabel="round", ylabel="ratio")
    for axes in (left, right):
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        _finish(axes)
    _save(figure, path)


def _ttft_by_turn(axes: Axes, groups: dict[str, list[Round]]) -> None:
    width = 0.8 / len(groups)
    for place, (name, rounds) in enumerate(groups.items()):
        by_turn: dict[int, list[float]] = {}
        for one in rounds:
            for turn in one.turns:
                by_turn.setdefault(turn.turn, []).append(turn.ttft_s)
        turns = sorted(by_turn)
        offset = (place - (len(groups) - 1) / 2) * width
        centres = [turn + 1 + offset for turn in turns]
        middle, low, high = (np.array([np.percentile(by_turn[t], q) for t in turns]) for q in (50, 10, 90))
        axes.bar(centres, middle, width * 0.92, color=_colour(name), label=name)
        axes.errorbar(centres, middle, [middle - low, high - middle], fmt="none", ecolor="#333333", elinewidth=1)
    axes.set(title="Time to first token (median, P10 to P90)", xlabel="turn", ylabel="seconds")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    _finish(axes)
    # Below the plot: within it, it would hide bars.
    axes.legend(frameon=False, loc="upper center", bbox_to_anchor=(0.5, -0.12), ncols=len(groups))


def _origins(axes: Axes, summaries: Sequence[Summary]) -> None:
    names = [summary.configuration for summary in summaries]
    base = np.zeros(len(names))
    for tier in tiers(summaries):
        share = np.array([summary.origin.get(tier, 0.0) for summary in summaries])
        axes.barh(names, share, left=base, color=TIER_COLOURS.get(tier, OTHER_COLOUR), label=tier)
        base += share
    axes.invert_yaxis()
    axes.xaxis.set_major_formatter(PercentFormatter(1.0))
    axes.set(title="Prompt tokens of returning turns, by origin", xlim=(0, 1))
    _finish(axes)
    axes.legend(frameon=False, loc="upper center", bbox_to_anchor=(0.5, -0.08), ncols=4)
    axes.grid(visible=False)


def _colour(name: str) -> str:
    return CONFIGURATION_COLOURS.get(name, OTHER_COLOUR)


def _finish(axes: Axes) -> None:
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", color="#e6e6e6")
    axes.set_axisbelow(True)
    axes.legend(frameon=False)


def _save(figure: Figure, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)
