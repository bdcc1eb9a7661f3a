"""Tiers that fail on purpose."""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from benchmark.load.trouble import FAULTS, DiskTrouble, RemoteTrouble
from benchmark.mooncake import Lender, Master

WRITER = """
import os, sys
fd = os.open(sys.argv[1], os.O_RDWR | os.O_CREAT)
def outcome(call, *args):
    try:
        call(*args)
    except OSError as error:
        return os.strerror(error.errno)
    return "done"
for _ in sys.stdin:
    calls = [(os.pwritev, fd, [b"x"], 0), (os.preadv, fd, [bytearray(1)], 0), (os.fdatasync, fd)]
    print([outcome(*call) for call in calls], flush=True)
"""


def test_a_disk_fails_while_the_rule_is_there_and_then_heals(tmp_path: Path) -> None:
    rule = tmp_path / "rule"
    env = {**os.environ, **DiskTrouble(rule, 1, 1).env}
    command = [sys.executable, "-c", WRITER, str(tmp_path / "file")]
    with subprocess.Popen(command, env=env, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as disk:
        assert disk.stdin is not None
        assert disk.stdout is not None

        def outcomes(fault: str) -> list[str]:
            rule.write_text(json.dumps(FAULTS[fault])) if fault else rule.unlink(missing_ok=True)
            disk.stdin.write("\n")  # type: ignore[union-attr]
            disk.stdin.flush()  # type: ignore[union-attr]
            return eval(disk.stdout.readline())  # type: ignore[union-attr]

        error, full = "Input/output error", "No space left on device"
        assert outcomes("") == ["done"] * 3
        assert outcomes("everything fails") == [error] * 3
        assert outcomes("reads fail") == ["done", error, "done"]
        assert outcomes("no space") == [full, "done", "done"]
        assert outcomes("slow reads") == ["done"] * 3
        assert outcomes("") == ["done"] * 3


def test_faults_come_in_turn_and_are_gone_at_the_end(tmp_path: Path) -> None:
    rule = tmp_path / "rule"

    async def watch() -> list[str]:
        trouble = DiskTrouble(rule, 0.02, 0.02)
        running = asyncio.create_task(trouble.run())
        seen: list[str] = []
        while trouble.faults <= len(FAULTS):
            if trouble.fault and trouble.fault not in seen[-1:]:
                assert json.loads(rule.read_text()) == FAULTS[trouble.fault]
                seen.append(trouble.fault)
            await asyncio.sleep(0)
        running.cancel()
        with pytest.raises(asyncio.CancelledError):
            await running
        assert trouble.fault == ""
        return seen

    assert asyncio.run(watch())[: len(FAULTS)] == list(FAULTS)
    assert not rule.exists()


def test_parts_of_a_store_go_in_turn_and_all_are_there_at_the_end(master: Master) -> None:
    with Lender(master, "16MiB") as lender:
        parts: dict[str, Master | Lender] = {"master away": master, "lender away": lender}

        async def watch() -> list[str]:
            trouble = RemoteTrouble(master, lender, 0.02, 0.02)
            running = asyncio.create_task(trouble.run())
            seen: list[str] = []
            while trouble.faults <= len(parts):
                if trouble.fault and trouble.fault not in seen[-1:]:
                    seen.append(trouble.fault)
                    assert [name for name, part in parts.items() if not part.runs] == [trouble.fault]
                await asyncio.sleep(0)
            running.cancel()
            with pytest.raises(asyncio.CancelledError):
                await running
            return seen

        assert asyncio.run(watch())[: len(parts)] == list(parts)
        assert all(part.runs for part in parts.values())
