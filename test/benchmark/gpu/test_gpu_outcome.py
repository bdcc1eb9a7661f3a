from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

from benchmark.gpu.bound import Bound
from benchmark.gpu.outcome import NOT_A_CLAIM, Outcome

FAST = Bound("speed", 0.9, at_least=True)
SOON = Bound("delay", 1.1)


@pytest.mark.parametrize(
    ("bound", "measured", "passed"),
    [
        (FAST, 0.9, True),
        (FAST, 0.89, False),
        (SOON, 1.1, True),
        (SOON, 1.11, False),
        (FAST, None, None),
        (FAST, math.nan, False),
        (SOON, math.nan, False),
    ],
)
def test_a_bound_holds_at_its_limit(bound: Bound, measured: float | None, passed: bool | None) -> None:
    assert bound.judge(measured).passed is passed


def test_an_outcome_says_what_it_is_worth(tmp_path: Path) -> None:
    outcome = Outcome("first", "cpu")
    outcome.add(FAST.judge(0.95), SOON.judge(None))
    outcome.rows.append({"speed": 0.95})
    content = json.loads(outcome.save(tmp_path).read_text())
    assert not content["claim"]
    assert not outcome.passed
    assert [bound["passed"] for bound in content["bounds"]] == [True, None]
    assert content["machine"]["packages"]["sglang"]
    assert content["rows"] == [{"speed": 0.95}]


def test_the_table_has_a_line_for_each_outcome(tmp_path: Path) -> None:
    for name, speed in (("b", 0.5), ("a", 1.0), ("b", 0.95)):
        outcome = Outcome(name, "cpu")
        outcome.add(FAST.judge(speed))
        outcome.save(tmp_path)
    head, rule, *lines = (tmp_path / "table.md").read_text().splitlines()
    assert head.count("|") == rule.count("|")
    assert [line.split(" | ")[0] for line in lines] == ["| a", "| b"]
    assert all(NOT_A_CLAIM in line and line.endswith("pass |") for line in lines)
