"""Results of an experiment: its JSON file, and its line in the table of all experiments."""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from benchmark.gpu.bound import Verdict
from benchmark.report import machine
from benchmark.simulated_gpu.environment import LIBRARIES

NOT_A_CLAIM = "no GPU, not a claim"
TABLE_HEAD = ("| experiment | device | date | bounds |", "|---|---|---|---|")
PACKAGES = ("sglang-kernel", "flashinfer-python", "transformers", "triton")


@dataclass
class Outcome:
    """Grows while the experiment runs; saved after each part, so that an interrupted run keeps what it has.

    `rows` hold one measurement each: lengths in tokens and bytes, times in seconds.
    """

    experiment: str
    device: str
    rows: list[dict[str, Any]] = field(default_factory=list)
    verdicts: list[Verdict] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    host_memory: dict[str, int] = field(default_factory=dict)
    """Bytes before the experiment, see `HostMemory`."""
    began: datetime = field(default_factory=lambda: datetime.now(UTC))

    @property
    def is_claim(self) -> bool:
        """Whether the numbers are from a real GPU; others only show that the experiment runs."""
        return self.device != "cpu" and LIBRARIES not in os.environ

    @property
    def passed(self) -> bool:
        """Whether every bound was measured and holds."""
        return all(verdict.passed for verdict in self.verdicts)

    def add(self, *verdicts: Verdict) -> None:
        self.verdicts += verdicts

    def save(self, directory: Path) -> Path:
        """Write `EXPERIMENT.json` into `directory`, and rewrite `table.md` from all such files there."""
        directory.mkdir(parents=True, exist_ok=True)
        path = directory / f"{self.experiment}.json"
        path.write_text(json.dumps(self._content(), indent=1, default=str) + "\n")
        lines = [json.loads(file.read_text()).get("line") for file in sorted(directory.glob("*.json"))]
        (directory / "table.md").write_text("\n".join([*TABLE_HEAD, *filter(None, lines)]) + "\n")
        return path

    def line(self) -> str:
        """Line of the table below `TABLE_HEAD`."""
        bounds = "; ".join(map(str, self.verdicts)) or "none"
        return f"| {self.experiment} | {describe(self.device)} | {self.began:%Y-%m-%d} | {bounds} |"

    def _content(self) -> dict[str, Any]:
        return {
            "experiment": self.experiment,
            "claim": self.is_claim,
            "date": self.began.isoformat(timespec="seconds"),
            "seconds": round((datetime.now(UTC) - self.began).total_seconds(), 1),
            "command": shlex.join(sys.orig_argv),
            "device": describe(self.device),
            "machine": machine() | {"more_packages": {name: _version(name) for name in PACKAGES}},
            "gpu": _gpu() if self.is_claim else None,
            "host_memory": self.host_memory,
            "bounds": [verdict.entry() for verdict in self.verdicts],
            "notes": self.notes,
            "line": self.line(),
            "rows": self.rows,
        }


def describe(device: str) -> str:
    """Name of the GPU, or a note that numbers without one are no claim."""
    real = device != "cpu" and LIBRARIES not in os.environ
    return torch.cuda.get_device_name(device) if real else NOT_A_CLAIM


def _gpu() -> dict[str, Any]:
    asked = ("name", "driver_version", "memory.total", "pcie.link.gen.current", "pcie.link.width.current")
    return {"cuda": torch.version.cuda, **_nvidia_smi(asked)}


def _nvidia_smi(fields: Sequence[str]) -> dict[str, str]:
    command = ["nvidia-smi", f"--query-gpu={','.join(fields)}", "--format=csv,noheader", "--id=0"]
    try:
        answer = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError):
        return {}
    return dict(zip(fields, answer.strip().split(", "), strict=False))


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
