from __future__ import annotations

import json
from pathlib import Path

import matplotlib.image
import pytest

from benchmark.index_speed import measure_index
from benchmark.opening import make_store, open_here
from benchmark.throughput import Comparison, Contest, DiskBench, HostBench, ModelShape
from benchmark.tiers import Result, main, opening_table, throughput_table

SHAPE = ModelShape(layers=2, kv_heads=2, head_dim=64)


def test_every_kind_of_measurement_is_reported(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shape = ["--layers", "2", "--kv-heads", "2", "--head-dim", "64"]
    sizes = [
        "--page-sizes",
        "16",
        "48",
        "--bytes",
        str(1 << 20),
        "--rounds",
        "1",
        "--openings",
        "1",
        "--store-pages",
        "100",
        "--encryption",
    ]
    places = ["--directory", str(tmp_path / "disk"), "--output", str(tmp_path / "out")]
    assert main([*shape, *sizes, *places]) == 0
    assert not (tmp_path / "disk").exists()
    shown = capsys.readouterr().out
    assert "host" in shown
    assert "evict" in shown
    content = json.loads((tmp_path / "out" / "tiers.json").read_text())
    measured = [(one["tier"], one["direction"], one["page_tokens"]) for one in content["throughput"]]
    directions = [("host", "save"), ("host", "load")]
    directions += [(tier, direction) for tier in ("disk", "encrypted") for direction in ("fill", "write", "read")]
    assert sorted(measured) == sorted((*one, size) for one in directions for size in (16, 48))
    assert all(len(one["ours_s"]) == len(one["raw_s"]) == 1 for one in content["throughput"])
    assert [(one["pages"], one["encrypted"]) for one in content["openings"]] == [(100, False), (100, True)]
    picture = matplotlib.image.imread(tmp_path / "out" / "tiers.png")
    assert min(picture.shape[:2]) > 400


def test_the_sides_take_turns_and_the_first_round_does_not_count() -> None:
    calls: list[str] = []
    contest = Contest(lambda: calls.append("ours"), lambda: calls.append("raw"))
    comparison = Comparison("host", "save", 16, 1, 1)
    list(contest.run(comparison, rounds=2))
    assert calls == ["raw", "ours", "ours", "raw", "raw", "ours"]
    assert len(comparison.ratios) == 2


def test_both_sides_of_the_host_move_the_same_bytes() -> None:
    bench = HostBench(SHAPE, page_tokens=16, size=1 << 20)
    contests = bench.contests()
    assert bench.page_bytes == SHAPE.token_bytes * 16
    before = bench._memory.copy()
    contests["save"].ours()
    assert sorted(bench._arena) == sorted(before)
    bench._memory[:] = 0
    contests["load"].ours()
    assert (bench._memory == before).all()
    contests["save"].raw()
    assert (bench._arena == before).all()


def test_both_sides_of_the_disk_move_the_same_bytes(tmp_path: Path) -> None:
    bench = DiskBench(tmp_path / "disk", SHAPE, page_tokens=16, size=1 << 20)
    contests = bench.contests()
    before = bench._memory.arena.clone()
    for direction in ("fill", "write"):
        contests[direction].before_ours()
        contests[direction].ours()
        contests[direction].before_raw()
        contests[direction].raw()
    for side in (contests["read"].ours, contests["read"].raw):
        bench._memory.arena.zero_()
        side()
        assert (bench._memory.arena == before).all()
    bench.close()
    assert not (tmp_path / "disk").exists()


def test_a_store_is_opened_with_all_its_pages(tmp_path: Path) -> None:
    make_store(tmp_path / "kv", 1500, chain=7)
    opening = open_here(tmp_path / "kv", 1500)
    assert opening.pages == 1500
    assert opening.seconds > 0
    assert opening.peak_bytes > 0


def test_index_operations() -> None:
    speeds = measure_index(pages=300, operations=100, rounds=2)
    assert [one.operation for one in speeds] == ["place", "find", "touch", "evict"]
    assert all(one.per_second > 0 for one in speeds)


def test_a_missed_bound_is_named() -> None:
    slow = Comparison("disk", "write", 64, 8 << 20, 1 << 30, ours_s=[2.0, 1.0], raw_s=[1.0, 1.0])
    small = Comparison("disk", "write", 4, 1 << 19, 1 << 30, ours_s=[2.0], raw_s=[1.0])
    rows = throughput_table(SHAPE, Result(comparisons=[slow, small])).columns[-1]._cells
    assert rows == ["[red]>= 0.90x missed[/]", ""]
    assert opening_table(Result()).row_count == 0
