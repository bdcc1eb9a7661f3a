"""A load test over time, as PNG."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from benchmark.load.ledger import Answer
from benchmark.load.outcome import Outcome
from benchmark.load.watch import Sample

SLICE = 15.0
"""Seconds that answers are counted over."""
BLUE, ORANGE, RED = "#0072b2", "#e69f00", "#d55e00"


def save_figure(path: Path, outcome: Outcome) -> None:
    """Answers per second and time to first token; resident memory; health and fill of the disk."""
    figure = Figure(figsize=(9, 8), layout="constrained")
    rows = figure.subplots(3, 1, sharex=True)
    _answers(rows[0], outcome.ledger.answers)
    _memory(rows[1], outcome.samples)
    _disk(rows[2], outcome.samples)
    for axes in rows:
        for start, end in _faults(outcome.samples):
            axes.axvspan(start, end, color=RED, alpha=0.1, linewidth=0)
        axes.spines[["top", "right"]].set_visible(False)
        axes.set_ylim(0, None)
    rows[-1].set_xlabel("seconds; shaded: the disk fails")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)


def _answers(axes: Axes, answers: Sequence[Answer]) -> None:
    by_slice: dict[int, list[float]] = {}
    for answer in answers:
        by_slice.setdefault(int(answer.at / SLICE), []).append(answer.ttft)
    slices = sorted(by_slice)
    centres = [(number + 0.5) * SLICE for number in slices]
    axes.plot(centres, [len(by_slice[number]) / SLICE for number in slices], color=BLUE)
    axes.set_ylabel("answers per second", color=BLUE)
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
    axes.set_ylabel("resident memory, MiB")
    axes.legend(frameon=False, loc="center right")


def _disk(axes: Axes, samples: Sequence[Sample]) -> None:
    at = [sample.at for sample in samples]
    for name, label, colour in (("host_pages", "host", BLUE), ("disk_pages", "disk", ORANGE)):
        fill = [sample.state[f"{name}_used"] / sample.state[name] for sample in samples]
        axes.plot(at, fill, color=colour, label=f"{label} fill")
    healthy = [float(sample.disk_healthy) for sample in samples]
    axes.step(at, healthy, where="post", color="#555555", linewidth=1, label="disk in service")
    axes.set_ylabel("share")
    axes.legend(frameon=False, loc="center right")


def _faults(samples: Sequence[Sample]) -> Iterator[tuple[float, float]]:
    """Start and end of every stretch of samples with a fault."""
    for fault, group in itertools.groupby(samples, key=lambda sample: sample.fault):
        stretch = list(group)
        if fault:
            yield stretch[0].at, stretch[-1].at
