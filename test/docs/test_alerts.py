"""The rules for Prometheus: each raises its alert when it should, and not before."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import yaml

from cached_attention.metrics import METRICS

RULES = Path(__file__).parents[2] / "docs" / "grafana" / "alerts.yml"
PROMTOOL = shutil.which("promtool")
PREFIX = "sglang:cached_attention_"
OF_A_SERVER = 'instance="a:30000", tp_rank="0"'


class Case(NamedTuple):
    alert: str
    series: dict[str, str]
    """Values of each minute, in Prometheus' notation, by metric and labels."""
    minutes: int
    """When the alert is there; at the start it is not."""


CASES = [
    Case("TierOutOfService", {'tier_healthy{%s, tier="disk"}': "1 1 1 0x10"}, 8),
    Case("DamagedPages", {'checksum_failures_total{%s, tier="disk"}': "0x5 1x10"}, 10),
    Case("HostMemoryInUse", {"declined_pages_total{%s}": "0 0 0+5x60"}, 45),
    Case("FailedSaves", {"failed_pages_total{%s}": "0x5 4x10"}, 10),
    Case("DiskIsSlow", {"dirty_pages{%s}": "10 60x60", 'capacity_pages{%s, tier="host"}': "100x60"}, 40),
]


def names() -> list[str]:
    (group,) = yaml.safe_load(RULES.read_text())["groups"]
    return [rule["alert"] for rule in group["rules"]]


def test_every_rule_has_a_case() -> None:
    assert names() == [f"CachedAttention{case.alert}" for case in CASES]
    known = {metric.name for metric in METRICS}
    assert {series.partition("{")[0] for case in CASES for series in case.series} <= known


@pytest.mark.skipif(PROMTOOL is None, reason="no `promtool` on the path (Debian: prometheus)")
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.alert)
def test_an_alert_is_raised(case: Case, tmp_path: Path) -> None:
    rule = f"CachedAttention{case.alert}"
    series = [
        {"series": PREFIX + name.replace("%s", OF_A_SERVER), "values": values}
        for name, values in case.series.items()
    ]
    fires = f'count(ALERTS{{alertname="{rule}", alertstate="firing"}})'
    queries: list[dict[str, Any]] = [
        {"expr": fires, "eval_time": "1m", "exp_samples": []},
        {"expr": fires, "eval_time": f"{case.minutes}m", "exp_samples": [{"labels": "{}", "value": 1}]},
    ]
    test = {"interval": "1m", "input_series": series, "promql_expr_test": queries}
    file = tmp_path / "test.yml"
    file.write_text(yaml.safe_dump({"rule_files": [str(RULES)], "evaluation_interval": "1m", "tests": [test]}))
    done = subprocess.run(
        [str(PROMTOOL), "test", "rules", str(file)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
