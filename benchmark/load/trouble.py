"""Tiers that fail now and then, and heal."""

from __future__ import annotations

import asyncio
import itertools
import json
from pathlib import Path
from typing import Any

from benchmark.mooncake import Lender, Master

FAILING_DISK = Path(__file__).parents[1] / "failing_disk"
FAULTS: dict[str, dict[str, Any]] = {
    "everything fails": {"calls": ["preadv", "pwritev", "fdatasync", "posix_fallocate"], "errno": "EIO"},
    "reads fail": {"calls": ["preadv"], "errno": "EIO"},
    "writes fail": {"calls": ["pwritev", "fdatasync"], "errno": "EIO"},
    "no space": {"calls": ["pwritev", "posix_fallocate"], "errno": "ENOSPC"},
    "slow reads": {"calls": ["preadv"], "seconds": 0.5},
}


class DiskTrouble:
    """Faults in turn, for a server that was started with `env`.

    Args:
        rule: file through which the server is told; made and removed here.
        calm, outage: seconds without a fault, and with one.
    """

    def __init__(self, rule: Path, calm: float, outage: float) -> None:
        self.fault = ""
        """The one that is there now, or none."""
        self.faults = 0
        """So far."""
        self._rule = rule
        self._calm, self._outage = calm, outage

    @property
    def env(self) -> dict[str, str]:
        """Of the server."""
        return {"PYTHONPATH": str(FAILING_DISK), "FAILING_DISK": str(self._rule)}

    async def run(self) -> None:
        """Until it is cancelled; then the disk is well."""
        try:
            for name in itertools.cycle(FAULTS):
                await asyncio.sleep(self._calm)
                self._break(name)
                await asyncio.sleep(self._outage)
                self._heal()
        finally:
            self._heal()

    def _break(self, name: str) -> None:
        draft = self._rule.with_suffix(".draft")
        draft.write_text(json.dumps(FAULTS[name]))
        draft.replace(self._rule)
        self.fault = name
        self.faults += 1

    def _heal(self) -> None:
        self._rule.unlink(missing_ok=True)
        self.fault = ""


class RemoteTrouble:
    """A running store whose parts are killed in turn, and started again: the master, then who lends memory.

    Args:
        calm, outage: seconds with all of it, and without a part.
    """

    def __init__(self, master: Master, lender: Lender, calm: float, outage: float) -> None:
        self.fault = ""
        """The part that is away now, or none."""
        self.faults = 0
        """So far."""
        self._parts: dict[str, Master | Lender] = {"master away": master, "lender away": lender}
        self._calm, self._outage = calm, outage

    async def run(self) -> None:
        """Until it is cancelled; then all of it is there."""
        try:
            for name in itertools.cycle(self._parts):
                await asyncio.sleep(self._calm)
                self._parts[name].kill()
                self.fault = name
                self.faults += 1
                await asyncio.sleep(self._outage)
                self._heal()
        finally:
            self._heal()

    def _heal(self) -> None:
        if self.fault:
            self._parts[self.fault].start()
            self.fault = ""
