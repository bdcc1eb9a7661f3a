"""Disks that are full, read-only, slow or gone, under a running server: always the right answer."""

from __future__ import annotations

import json
import shutil
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

HISTORY, CONVERSATIONS, TURNS = 400, 6, 30
PAGE_BYTES = 256 << 10
TIGHT = ("--max-total-tokens", "2048")
HOST = "6MB"
SLOW_READS = Path(__file__).parents[2] / "benchmark" / "slow_reads"


@pytest.fixture
def disk(disk_tier: Any) -> Any:
    return lambda directory, size="40MB": disk_tier(directory, size)


@pytest.fixture(scope="module")
def expected(answers: Any) -> Any:
    """Per conversation, per turn: the answers of a server that keeps everything on the device."""
    return answers(conversations=CONVERSATIONS, turns=TURNS)


def mount(*arguments: str | Path) -> None:
    subprocess.run(["mount", *map(str, arguments)], check=True, capture_output=True, timeout=30)


@contextmanager
def small_file_system(place: Path) -> Iterator[Path]:
    place.mkdir()
    try:
        mount("-t", "tmpfs", "-o", "size=48m", "tmpfs", place)
    except (OSError, subprocess.SubprocessError) as refusal:
        pytest.skip(f"file systems cannot be mounted here: {refusal}")
    try:
        yield place
    finally:
        subprocess.run(["umount", "--lazy", str(place)], check=True, timeout=30)


def test_a_disk_that_is_full_and_then_has_room(
    models: Any, start: Any, town: Any, store_states: Any, tmp_path: Path, disk: Any, expected: Any, matches: Any
) -> None:
    talk = town(CONVERSATIONS, HISTORY)
    with small_file_system(tmp_path / "small") as place:
        filler = place / "not-ours"
        with start(models(), *TIGHT, *disk(place / "kv"), host_size=HOST) as server:
            filler.write_bytes(bytes(46 << 20))
            talk.hold(server, 2)
            assert store_states(server)[0]["disk_pages_used"] * PAGE_BYTES < 2 << 20
            filler.unlink()
            for _ in range(TURNS - 2):
                talk.hold(server, 1)
                if talk.cached("storage"):
                    break
                time.sleep(3)  # The tier comes back by itself, some seconds after its last error.
            assert talk.cached("storage") > 0
    assert matches(talk, expected)


def test_a_directory_that_vanishes_is_a_miss(
    models: Any, start: Any, town: Any, tmp_path: Path, disk: Any, expected: Any, matches: Any
) -> None:
    talk = town(CONVERSATIONS, HISTORY)
    kept = tmp_path / "kv"
    with start(models(), *TIGHT, *disk(kept), host_size=HOST) as server:
        talk.hold(server, 1)
        shutil.rmtree(kept)
        talk.hold(server, 2)
    assert matches(talk, expected)


def test_a_slow_disk_is_not_waited_for(
    models: Any,
    start: Any,
    town: Any,
    store_states: Any,
    settled: Any,
    tmp_path: Path,
    disk: Any,
    expected: Any,
    matches: Any,
) -> None:
    talk = town(CONVERSATIONS, HISTORY)
    pace = tmp_path / "seconds"
    env = {"PYTHONPATH": str(SLOW_READS), "SLOW_READS": str(pace)}
    measured = (*disk(tmp_path / "kv", "500MB"), "--cached-attention-wait", "measured")
    with start(models(), *TIGHT, *measured, host_size=HOST, env=env, command=True) as server:
        talk.hold(server, 2)
        state = settled(server)
        assert state["disk_pages_used"] > state["host_pages_used"]
        pace.write_text(json.dumps(2.0))
        talk.hold(server, 2)
        assert store_states(server)[0]["recomputed"] > 0
    assert matches(talk, expected)
