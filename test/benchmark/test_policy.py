from __future__ import annotations

import json
import random
from pathlib import Path

import pytest

from benchmark import paper, policy
from cached_attention.simulator.trace import read_trace


@pytest.fixture
def trace(tmp_path: Path) -> Path:
    """Conversations that return in turns, each a block longer."""
    source, chains, lines, block = random.Random(3), [[0] for _ in range(60)], [], 1
    for request in range(600):
        chain = source.choice(chains)
        chain.append(block)
        block += 1
        fields = {"timestamp": 1000 * request, "input_length": 512 * len(chain), "output_length": 20}
        lines.append(json.dumps(fields | {"hash_ids": chain}))
    path = tmp_path / "trace.jsonl"
    path.write_text("\n".join(lines))
    return path


def test_policies_on_a_trace(trace: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "out"
    assert policy.main(["--trace", str(trace), "--capacity", "150", "300", "--output", str(output)]) == 0
    content = json.loads(output.with_suffix(".json").read_text())
    rates = {(one["policy"], one["capacity"]): one for one in content["results"]}
    for capacity in (150, 300):
        assert rates["lru", capacity]["gap_closed"] == 0
        assert rates["optimum", capacity]["gap_closed"] == 1
        assert all(one["hit_rate"] <= rates["optimum", capacity]["hit_rate"] for one in content["results"][:9])
    assert output.with_suffix(".png").stat().st_size > 1000
    assert "optimum" in capsys.readouterr().out


def test_policies_under_load(trace: Path, tmp_path: Path) -> None:
    output = tmp_path / "out"
    arguments = [
        "--trace",
        str(trace),
        "--capacity",
        "150",
        "--queue",
        "400",
        "--policies",
        "ours",
        "lru",
        "optimum",
    ]
    assert policy.main([*arguments, "--output", str(output)]) == 0
    content = json.loads(output.with_suffix(".json").read_text())
    assert content["known_pages"]["queue 400"] > 150
    (ours,) = (one for one in content["results"] if one["policy"] == "ours")
    assert ours["gap_closed"] > 0.8


def test_known_pages_are_those_whose_next_user_waits(trace: Path) -> None:
    requests = read_trace(trace)
    assert policy.known_pages(requests, 1) < policy.known_pages(requests, 100)
    assert policy.known_pages(requests[:1], 100) == 0


def test_the_setup_of_the_paper(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "out"
    arguments = ["--models", "13B", "--scale", "0.02", "--page-size", "256", "--output", str(output)]
    assert paper.main(arguments) == 0
    ours, nothing = json.loads(output.with_suffix(".json").read_text())["results"]
    assert nothing["hit_rate"] < 0.1 < ours["hit_rate"] <= ours["possible"]
    assert ours["prefill_throughput"] > nothing["prefill_throughput"]
    assert "Against recomputing" in capsys.readouterr().out
