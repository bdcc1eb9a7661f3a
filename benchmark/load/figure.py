"""Plots a load test over time, as PNG."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter

from benchmark.load.ledger import Answer
from benchmark.load.outcome import Outcome
from benchmark.load.watch import Sample

SLICE = 15.0
"""Seconds over which answers are counted."""
BLUE, ORANGE, RED, GREEN = "#0072b2", "#e69f00", "#d55e00", "#009e73"


def save_figure(path: Path, outcome: Outcome) -> None:
    """Answers per second and time to first token; resident memory; health and fill of the disk."""
    figure = Figure(figsize=(9, 8), layout="constrained")
    rows = figure.subplots(3, 1, sharex=True)
    _answers(rows[0], outcome.ledger.answers)
    _memory(rows[1], outcome.samples)
    _disk(rows[2], outcome.samples)
    for axes in rows:
        for start, end in stretches(outcome.samples, lambda sample: bool(sample.fault)):
            axes.axvspan(start, end, color=RED, alpha=0.1, linewidth=0)
        axes.spines[["top", "right"]].set_visible(False)
    rows[-1].set_xlabel("seconds; shaded: the disk fails, or reads slowly")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)


def _answers(axes: Axes, answers: Sequence[Answer]) -> None:
    by_slice: dict[int, list[float]] = {}
    for answer in (answer for answer in answers if not answer.stalled):
        by_slice.setdefault(int(answer.at / SLICE), []).append(answer.ttft)
    slices = sorted(by_slice)
    centres = [(number + 0.5) * SLICE for number in slices]
    axes.plot(centres, [len(by_slice[number]) / SLICE for number in slices], color=BLUE)
    axes.set_ylabel("answers per second", color=BLUE)
    axes.set_ylim(0, None)
    times = axes.twinx()
    for level, style in ((50, "-"), (99, ":")):
        values = [np.percentile(by_slice[number], level) for number in slices]
        times.plot(centres, values, style, color=ORANGE, label=f"P{level}")
    times.set(ylabel="time to first token, s", ylim=(0, None))
    times.legend(frameon=False, loc="lower right")
    times.spines["top"].set_visible(False)


def _memory(axes: Axes, samples: Sequence[Sample]) -> None:
    at = [sample.at for sample in samples]
    for name in samples[-1].rss:
        axes.plot(at, [sample.rss.get(name, 0) / 2**20 for sample in samples], label=name)
    axes.set(ylabel="resident memory, MiB", ylim=(0, None))
    axes.legend(frameon=False, loc="lower right", bbox_to_anchor=(1, 1), ncols=3)


def _disk(axes: Axes, samples: Sequence[Sample]) -> None:
    at = [sample.at for sample in samples]
    for name, label, colour in (("host_pages", "host memory", BLUE), ("disk_pages", "disk", ORANGE)):
        fill = [sample.state[f"{name}_used"] / sample.state[name] for sample in samples]
        axes.plot(at, fill, color=colour, label=label)
    out = [(start, end - start) for start, end in stretches(samples, lambda s: not s.disk_healthy)]
    axes.broken_barh(out, (-0.06, 0.04), color=RED, label="disk out of service")
    away = [(start, end - start) for start, end in stretches(samples, lambda s: not s.remote_healthy)]
    if away:
        axes.broken_barh(away, (-0.12, 0.04), color=GREEN, label="remote out of service")
    axes.set(ylabel="pages, share of room", ylim=(-0.14, 1.05))
    axes.yaxis.set_major_formatter(PercentFormatter(1.0))
    axes.legend(frameon=False, loc="lower right", bbox_to_anchor=(1, 1), ncols=4)


def stretches(samples: Sequence[Sample], holds: Callable[[Sample], bool]) -> Iterator[tuple[float, float]]:
    """Start of every stretch of samples for which `holds` is true, and time of the sample after it."""
    start = None
    for sample in samples:
        if holds(sample):
            start = sample.at if start is None else start
        elif start is not None:
            yield start, sample.at
            start = None
    if start is not None:
        yield start, samples[-1].at
