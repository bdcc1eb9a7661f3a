"""Results of a load test, and whether they are good enough."""

from __future__ import annotations

import itertools
import json
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from benchmark.load.ledger import Ledger
from benchmark.load.reference import Comparison
from benchmark.load.watch import Sample
from benchmark.report import machine

FLAT = 0.02
"""Share by which resident memory may grow over the whole run, at the pace of the second half."""


class Check(NamedTuple):
    what: str
    measured: str
    bound: str
    holds: bool


def growth(samples: Sequence[Sample], process: str | None = None) -> float:
    """Bytes by which resident memory would grow over the whole run at the pace of its second half.

    The pace is the slope of the least-squares line through the samples. The first half is left out, because pools
    fill up and code runs for the first time in it.

    Args:
        process: count this process only; None: all.
    """
    seconds = np.array([sample.at for sample in samples])
    sizes = np.array([_resident(sample, process) for sample in samples], dtype=float)
    late = seconds >= seconds[-1] / 2
    if late.sum() < 3:
        raise ValueError(f"{late.sum()} samples in the second half: the run is too short, give it 3 or more.")
    slope, _ = np.polyfit(seconds[late], sizes[late], 1)
    return float(slope * seconds[-1])


def _resident(sample: Sample, process: str | None) -> int:
    return sum(sample.rss.values()) if process is None else sample.rss.get(process, 0)


def resident(samples: Sequence[Sample]) -> float:
    """Mean resident bytes of all processes in the second half."""
    return float(np.mean([_resident(s, None) for s in samples if s.at >= samples[-1].at / 2]))


def outages(healthy: Iterable[bool]) -> tuple[int, int]:
    """How often a tier was seen to go out of service and to come back."""
    pairs = list(itertools.pairwise(healthy))
    return sum(was and not now for was, now in pairs), sum(now and not was for was, now in pairs)


def quantiles(values: Sequence[float]) -> dict[str, float]:
    """Quantiles by name; empty if there are no values."""
    levels = {"P50": 0.5, "P90": 0.9, "P99": 0.99, "max": 1.0}
    return {} if not values else {name: float(np.quantile(values, level)) for name, level in levels.items()}


@dataclass(frozen=True)
class Outcome:
    ledger: Ledger
    samples: list[Sample]
    final: dict[str, Any]
    """State of the store at rest."""
    faults: int
    flushed: int
    stalled: float
    """Seconds left out by the clock."""
    comparison: Comparison
    hits: dict[str, int]
    """Prompt tokens by the tier they came from, as counted by the server, including aborted requests."""
    remote_faults: int | None = None
    """None: no remote tier."""

    @property
    def ttft(self) -> dict[str, float]:
        """Seconds, by quantile."""
        return quantiles([answer.ttft for answer in self.ledger.answers if not answer.stalled])

    @property
    def cached(self) -> Counter[str]:
        """Prompt tokens by the tier they came from."""
        tokens: Counter[str] = Counter()
        for answer in self.ledger.answers:
            tokens.update(answer.cached)
        return tokens

    def checks(self) -> list[Check]:
        compared, failures = self.comparison, self.ledger.failures.total()
        grown, size = growth(self.samples), resident(self.samples)
        return [
            Check("wrong answers", f"{len(compared.wrong)} of {compared.compared}", "0", not compared.wrong),
            Check("answers compared", f"{compared.compared:,}", "> 0", compared.compared > 0),
            Check("HTTP 5xx", str(self.ledger.server_errors), "0", not self.ledger.server_errors),
            Check("lost, refused, damaged", str(failures), "0", not failures),
            *self._tier_checks("disk", [sample.disk_healthy for sample in self.samples]),
            *(
                []
                if self.remote_faults is None
                else self._tier_checks("remote", [sample.remote_healthy for sample in self.samples])
            ),
            Check("whole cache flushed", str(self.flushed), "> 0", self.flushed > 0),
            Check("pins at rest", str(self.final.get("pins")), "0", self.final.get("pins") == 0),
            Check(
                "memory growth",
                f"{grown / size:+.2%} of {size / 2**20:,.0f} MiB",
                f"<= {FLAT:.0%}",
                grown <= FLAT * size,
            ),
        ]

    def _tier_checks(self, tier: str, healthy: Sequence[bool]) -> list[Check]:
        (went, came), hits = outages(healthy), self.hits.get(tier, 0)
        return [
            Check(f"{tier} out of service, back", f"{went}, {came}", "> 0, as often", 0 < went <= came),
            Check(f"tokens from {tier}", f"{hits:,}", "> 0", hits > 0),
        ]

    def save(self, path: Path, parameters: dict[str, Any]) -> None:
        ledger = self.ledger
        content = {
            "parameters": parameters,
            "machine": machine(),
            "checks": [check._asdict() for check in self.checks()],
            "stalled_s": self.stalled,
            "ttft_s": self.ttft,
            "answers": len(ledger.answers),
            "prompt_tokens": sum(answer.prompt_tokens for answer in ledger.answers),
            "cached_tokens": dict(self.cached),
            "hit_tokens": self.hits,
            "faults": self.faults,
            "remote_faults": self.remote_faults,
            "statuses": {f"{path} {status}": count for (path, status), count in sorted(ledger.statuses.items())},
            "aborts": dict(ledger.aborts),
            "failures": dict(ledger.failures),
            "comparison": asdict(self.comparison),
            "growth_bytes": {name: growth(self.samples, name) for name in self.samples[-1].rss},
            "final": {name: value for name, value in self.final.items() if name != "hottest"},
            "samples": [sample._asdict() for sample in self.samples],
        }
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(content, indent=1, default=str) + "\n")
