from __future__ import annotations

import io
import json
from pathlib import Path

import matplotlib.image
import pytest
from rich.console import Console
from rich.table import Table

from benchmark.client import Round
from benchmark.figure import save_multiturn, save_zero_hit
from benchmark.report import mismatch_lines, multiturn_table, tiers, write_json, zero_hit_table
from benchmark.summary import Agreement, Mismatch, Summary, agreement, by_configuration, summarise


@pytest.fixture
def summaries(rounds: list[Round]) -> list[Summary]:
    return [summarise(group) for group in by_configuration(rounds).values()]


def rendered(table: Table) -> str:
    console = Console(width=120, record=True, file=io.StringIO())
    console.print(table)
    return console.export_text()


def row(text: str, label: str) -> list[str]:
    (line,) = [line for line in text.splitlines() if label in line]
    return [cell.strip() for cell in line.strip("│ ").split("│")]


def test_multiturn_table(rounds: list[Round], summaries: list[Summary]) -> None:
    groups = by_configuration(rounds)
    text = rendered(multiturn_table(summaries, [agreement(groups["cached-attention"], groups["stock"])]))
    ratio = summaries[0].ttft.mean / summaries[1].ttft.mean
    assert row(text, "speed-up over stock")[1:] == ["1.00x", f"{ratio:.2f}x"]
    assert row(text, "prompt from host")[1:] == ["0.0%", "80.0%"]
    assert row(text, "prompt computed")[1:] == ["100.0%", "10.0%"]
    assert row(text, "answers that differ")[1:] == ["reference", "0 of 24"]


def test_zero_hit_table(rounds: list[Round]) -> None:
    text = rendered(zero_hit_table(rounds))
    assert row(text, "throughput, median")[1:] == ["51.0 tok/s", "510.0 tok/s"]
    assert row(text, "ratio to stock, median")[1:] == ["1.000x", "10.000x"]
    assert row(text, "lowest and highest ratio")[2] == "10.000x, 10.000x"
    assert row(text, "answers that differ")[1:] == ["reference", "0 of 24"]


def test_tiers_are_ordered_by_speed(summaries: list[Summary]) -> None:
    assert tiers(summaries) == ["device", "host", "computed"]


def test_long_lists_of_mismatches_are_cut() -> None:
    misses = tuple(Mismatch("device", 0, conversation, 1, 3) for conversation in range(7))
    lines = mismatch_lines([Agreement("device", 30, misses)])
    assert lines[0] == "device: round 0, conversation 0, turn 1: answers differ from token 3 on"
    assert len(lines) == 6
    assert lines[-1] == "device: and 2 more"
    assert mismatch_lines([Agreement("device", 30, ())]) == []


def test_json_holds_parameters_versions_and_every_turn(
    tmp_path: Path, rounds: list[Round], summaries: list[Summary]
) -> None:
    path = tmp_path / "deep" / "result.json"
    write_json(path, {"seed": 3, "model_path": Path("out/model")}, rounds, summaries=summaries)
    content = json.loads(path.read_text())
    assert content["parameters"] == {"seed": 3, "model_path": "out/model"}
    assert content["machine"]["packages"]["sglang"]
    assert content["summaries"][1]["origin"]["host"] == pytest.approx(0.8)
    assert [len(one["turns"]) for one in content["rounds"]] == [12, 12, 12, 12]


def test_figures_are_pictures(tmp_path: Path, rounds: list[Round], summaries: list[Summary]) -> None:
    save_multiturn(tmp_path / "a.png", rounds, summaries)
    save_zero_hit(tmp_path / "b.png", rounds)
    for name in ("a.png", "b.png"):
        picture = matplotlib.image.imread(tmp_path / name)
        assert min(picture.shape[:2]) > 400
        assert picture[..., :3].std() > 0.05
