"""Tiers that fail from time to time, and recover."""

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
    """Injects one fault after another into a server that was started with `env`.

    Args:
        rule: file that tells the server about the fault; created and removed here.
        calm, outage: seconds without a fault, and with one.
    """

    def __init__(self, rule: Path, calm: float, outage: float) -> None:
        self.fault = ""
        """Current fault, or empty."""
        self.faults = 0
        """Faults so far."""
        self._rule = rule
        self._calm, self._outage = calm, outage

    @property
    def env(self) -> dict[str, str]:
        """Environment of the server."""
        return {"PYTHONPATH": str(FAILING_DISK), "FAILING_DISK": str(self._rule)}

    async def run(self) -> None:
        """Run until cancelled; the disk works again afterwards."""
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
    """A running store whose parts are killed and restarted alternately: the master and the memory lender.

    Args:
        calm, outage: seconds with all parts running, and with one killed.
    """

    def __init__(self, master: Master, lender: Lender, calm: float, outage: float) -> None:
        self.fault = ""
        """The part that is down now, or empty."""
        self.faults = 0
        """Faults so far."""
        self._parts: dict[str, Master | Lender] = {"master away": master, "lender away": lender}
        self._calm, self._outage = calm, outage

    async def run(self) -> None:
        """Run until cancelled; all parts run again afterwards."""
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
