"""Tables for the terminal and the JSON file of the truncation benchmark."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.table import Table

from benchmark.report import machine
from benchmark.truncation.experiment import Findings, Quality
from benchmark.truncation.method import METHODS, REFERENCE
from benchmark.truncation.recall import PLACES
from benchmark.truncation.score import Interval

BOUND = 0.02
"""Share by which CA's perplexity may exceed TT's."""
USED = 1.1
"""Lowest ratio of the perplexity with the shortest context to that with the longest."""
KNOWN = 0.8
"""Share of the facts that must be known when nothing was dropped, for recall to mean anything."""
BROKEN = 1.2
"""Ratio to TT's perplexity that NKVT must reach; otherwise the experiment would not notice a wrong position."""
LOSSES_KEPT = 200


def method_table(findings: Findings) -> Table:
    """One row per method: quality of its predictions after one truncation or more."""
    quality = findings.quality(REFERENCE)
    title = f"After truncation: {quality.predictions:,} tokens of {findings.conversations} conversations"
    return _quality_table(title, [findings.quality(name) for name in METHODS])


def quoting_table(findings: Findings) -> Table:
    """Like `method_table`, for text that repeats parts of itself."""
    return _quality_table("The same on text made to repeat parts of itself", findings.quoting)


def _quality_table(title: str, qualities: Iterable[Quality]) -> Table:
    table = Table(title=title, title_justify="left")
    for heading in ("", "perplexity", f"against {REFERENCE}", "next token right", f"same as {REFERENCE}"):
        table.add_column(heading, justify="right" if heading else "left")
    for one in qualities:
        table.add_row(
            one.method,
            _number(one.perplexity),
            _ratio(one.ratio),
            _percent(one.accuracy),
            _percent(one.agreement),
        )
    return table


def recall_table(findings: Findings) -> Table:
    """One row per method: facts remembered after one truncation or more, by where they were stated."""
    table = Table(title="Facts remembered, by where they were stated", title_justify="left")
    table.add_column("")
    for place in PLACES:
        table.add_column(f"{place} ({findings.recall(REFERENCE, place).questions})", justify="right")
    for name in METHODS:
        table.add_row(name, *(_percent(findings.recall(name, place).accuracy) for place in PLACES))
    return table


def truncation_table(findings: Findings) -> Table:
    """One column per number of truncations: TT's perplexity, and those of the others as ratios to it."""
    counts = [
        one.truncations for one in findings.qualities if one.method == REFERENCE and one.truncations is not None
    ]
    table = Table(title="Perplexity by truncations so far", title_justify="left")
    table.add_column("")
    for count in counts:
        table.add_column(str(count), justify="right")
    table.add_row(REFERENCE, *(f"{findings.quality(REFERENCE, count).perplexity.value:.2f}" for count in counts))
    for name in METHODS:
        if name != REFERENCE:
            table.add_row(
                f"{name} / {REFERENCE}", *(f"{findings.quality(name, count).ratio.value:.3f}" for count in counts)
            )
    return table


def context_table(findings: Findings) -> Table:
    """Does the model use its context? Perplexity of the same tokens with increasing context."""
    table = Table(title="Perplexity by context", title_justify="left")
    table.add_column("tokens of context")
    table.add_column("text", justify="right")
    table.add_column("text that repeats itself", justify="right")
    for one, quoting in zip(findings.context_uses, findings.quoting_context_uses, strict=True):
        table.add_row(f"{one.window // 2} to {one.window}", _number(one.perplexity), _number(quoting.perplexity))
    return table


def verdict(findings: Findings) -> str:
    """Whether CA stays within the bound, as a sentence."""
    ratio = findings.quality("CA").ratio
    kept = "within" if ratio.high <= 1 + BOUND else "not shown to be within"
    return f"CA's perplexity is {_ratio(ratio)} of {REFERENCE}'s: {kept} the bound of {1 + BOUND}"


def controls(findings: Findings) -> list[str]:
    """What the model or the experiment is too weak to show, as sentences; empty if nothing."""
    found = []
    short, long = findings.context_uses[0], findings.context_uses[-1]
    half = next(one for one in findings.context_uses if 2 * one.window == long.window)
    if short.perplexity.value < USED * long.perplexity.value or half.perplexity.value <= long.perplexity.value:
        found.append(
            "the model hardly uses the far part of its context, so that losing it costs little; train longer"
        )
    if findings.recall("full context", "kept").accuracy.low < KNOWN:
        found.append("the model has not learnt to look facts up, so that recall says nothing; train longer")
    if findings.quality("NKVT").ratio.low < BROKEN:
        found.append(
            f"NKVT's perplexity is not clearly above {BROKEN} of {REFERENCE}'s: positions hardly matter here"
        )
    return found


def write_json(
    path: Path, parameters: Mapping[str, Any], training: Mapping[str, Any], findings: Findings
) -> None:
    """Write parameters, training and findings, with versions and machine."""
    content = {
        "parameters": dict(parameters),
        "machine": machine(),
        "training": dict(training),
        "findings": asdict(findings),
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, indent=1, default=str) + "\n")


def _number(one: Interval) -> str:
    return f"{one.value:.2f} [{one.low:.2f}, {one.high:.2f}]"


def _ratio(one: Interval) -> str:
    return f"{one.value:.3f} [{one.low:.3f}, {one.high:.3f}]"


def _percent(one: Interval) -> str:
    return f"{one.value:.1%} [{one.low:.1%}, {one.high:.1%}]"
