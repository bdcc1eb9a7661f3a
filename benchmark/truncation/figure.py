"""Figure of the truncation benchmark, written as PNG."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter, ScalarFormatter

from benchmark.truncation.experiment import Findings, Quality
from benchmark.truncation.method import METHODS, REFERENCE
from benchmark.truncation.recall import PLACES
from benchmark.truncation.report import BOUND
from benchmark.truncation.score import Interval

COLOURS = {
    "full context": "#8c8c8c",
    "TT": "#333333",
    "CA": "#0072b2",
    "TT, no sink": "#b39b00",
    "CA, no sink": "#e69f00",
    "NKVT": "#d55e00",
}
CLOSE = ("full context", "CA", "CA, no sink")
"""Methods close enough to TT to be shown beside it."""


def save_truncation(path: Path, findings: Findings) -> None:
    """Perplexity by truncations, the same relative to TT, facts remembered, and the use of the context."""
    figure = Figure(figsize=(11, 7.6), layout="constrained")
    (perplexity, ratio), (recall, context) = figure.subplots(2, 2)
    _perplexity(perplexity, findings)
    _ratio_to_reference(ratio, findings)
    _recall(recall, findings)
    _context(context, findings)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)


def _perplexity(axes: Axes, findings: Findings) -> None:
    for name in METHODS:
        if name != "TT, no sink":
            _curve(axes, findings, name, lambda one: one.perplexity)
    axes.set(title="Perplexity of held-out text", xlabel="truncations so far", yscale="log")
    _plain_numbers(axes)
    _finish(axes)


def _ratio_to_reference(axes: Axes, findings: Findings) -> None:
    axes.axhline(1.0, color=COLOURS[REFERENCE], linewidth=1)
    axes.axhspan(1 - BOUND, 1 + BOUND, color="#0072b2", alpha=0.08, linewidth=0, label=f"within {BOUND:.0%}")
    for name in CLOSE:
        _curve(axes, findings, name, lambda one: one.ratio)
    axes.set(
        title=f"Perplexity against {REFERENCE} (computing the kept tokens again)", xlabel="truncations so far"
    )
    _finish(axes)


def _recall(axes: Axes, findings: Findings) -> None:
    width = 0.8 / len(METHODS)
    for place, name in enumerate(METHODS):
        found = [findings.recall(name, where).accuracy for where in PLACES]
        centres = np.arange(len(PLACES)) + (place - (len(METHODS) - 1) / 2) * width
        axes.bar(centres, [one.value for one in found], width * 0.92, color=COLOURS[name], label=name)
        axes.errorbar(
            centres, [one.value for one in found], _errors(found), fmt="none", ecolor="#333333", elinewidth=1
        )
    axes.set_xticks(
        range(len(PLACES)), [f"in the {place} part" if place != "sink" else "in the sink" for place in PLACES]
    )
    axes.yaxis.set_major_formatter(PercentFormatter(1.0))
    axes.set(title="Facts remembered, by where they were stated", ylim=(0, 1))
    _finish(axes)
    axes.legend(frameon=False, fontsize="small", loc="center right")


def _context(axes: Axes, findings: Findings) -> None:
    windows = [one.window for one in findings.context_uses]
    texts = {"text": findings.context_uses, "text that repeats itself": findings.quoting_context_uses}
    for (name, uses), colour in zip(texts.items(), (COLOURS[REFERENCE], "#009e73"), strict=True):
        found = [one.perplexity for one in uses]
        values = [one.value for one in found]
        axes.errorbar(windows, values, _errors(found), marker="o", capsize=3, color=colour, label=name)
    axes.legend(frameon=False, fontsize="small")
    axes.set(title="Does the model use its context?", xlabel="context at most, tokens", ylabel="perplexity")
    axes.set_xscale("log", base=2)
    axes.set_xticks(windows, [str(window) for window in windows])
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", color="#e6e6e6")


def _curve(axes: Axes, findings: Findings, name: str, of: Callable[[Quality], Interval]) -> None:
    points = [one for one in findings.qualities if one.method == name and one.truncations is not None]
    places = np.array([one.truncations for one in points], dtype=float)
    # Side by side, so that the intervals of equal methods can be distinguished.
    places += 0.07 * (list(METHODS).index(name) - 2)
    found = [of(one) for one in points]
    style: dict[str, Any] = {"marker": "o", "markersize": 4, "capsize": 2, "elinewidth": 1}
    axes.errorbar(places, [one.value for one in found], _errors(found), color=COLOURS[name], label=name, **style)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))


def _errors(found: list[Interval]) -> np.ndarray:
    return np.array([[one.value - one.low for one in found], [one.high - one.value for one in found]]).clip(min=0)


def _plain_numbers(axes: Axes) -> None:
    axes.yaxis.set_major_formatter(ScalarFormatter())
    axes.yaxis.set_minor_formatter(ScalarFormatter())


def _finish(axes: Axes) -> None:
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", color="#e6e6e6")
    axes.set_axisbelow(True)
    axes.legend(frameon=False, fontsize="small")
