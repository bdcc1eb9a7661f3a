import json
import re
from pathlib import Path

import pytest
from grafana_foundation_sdk.cog.encoder import JSONEncoder
from grafana_foundation_sdk.cog.plugins import register_default_plugins
from grafana_foundation_sdk.models.dashboard import Dashboard, Panel, RowPanel

from cached_attention.metrics import METRICS, PREFIX, Kind
from docs.metrics import PAGE, render

DOCS = Path(__file__).parents[2] / "docs"
DASHBOARD = json.loads((DOCS / "grafana" / "cached-attention.json").read_text())
SAMPLES = {
    Kind.COUNTER: ("",),
    Kind.GAUGE: ("",),
    Kind.HISTOGRAM: ("_bucket", "_sum", "_count"),
}
EXPORTED = {metric.full_name + end: metric for metric in METRICS for end in SAMPLES[metric.kind]}
TARGETS = [target for panel in DASHBOARD["panels"] for target in panel.get("targets", [])]
QUERIES = [target["expr"] for target in TARGETS] + [
    variable["query"]["query"] for variable in DASHBOARD["templating"]["list"] if variable["type"] == "query"
]


def names_in(query: str) -> list[str]:
    """Prometheus knows them with a colon or an underscore, as it negotiates; the dashboard takes both."""
    return [f"sglang:{name}" for name in re.findall(r'"sglang\[:_\]([a-z_]+)"', query)]


def test_the_page_is_what_the_code_says():
    assert PAGE.read_text() == render(), "run `python -m docs.metrics`"


def test_names_follow_prometheus():
    names = [metric.name for metric in METRICS]
    assert len(set(names)) == len(names)
    for metric in METRICS:
        assert re.fullmatch("[a-z][a-z_]*[a-z]", metric.name)
        assert metric.name.endswith("_total") == (metric.kind is Kind.COUNTER)
        assert bool(metric.buckets) == (metric.kind is Kind.HISTOGRAM)
        assert metric.help.endswith(".")


@pytest.mark.parametrize("query", QUERIES)
def test_the_dashboard_asks_for_what_is_exported(query):
    names = names_in(query)
    assert names
    for name in names:
        assert name in EXPORTED or not name.startswith(PREFIX), name


@pytest.mark.parametrize("target", TARGETS, ids=lambda target: target["expr"])
def test_the_dashboard_groups_by_labels_that_there_are(target):
    known = {label for name in names_in(target["expr"]) if name in EXPORTED for label in EXPORTED[name].labels}
    used = {
        label.strip() for group in re.findall(r"by \(([^)]*)\)", target["expr"]) for label in group.split(",")
    }
    shown = set(re.findall(r"{{(\w+)}}", target["legendFormat"]))
    assert used <= known | {"le"}
    assert shown <= used


def test_every_metric_that_tells_of_trouble_is_on_the_dashboard():
    shown = {name for query in QUERIES for name in names_in(query)}
    for name in ("tier_healthy", "checksum_failures_total", "tier_errors_total", "declined_pages_total"):
        assert PREFIX + name in shown


def lost(given, kept, path="dashboard"):
    """Where `kept` lacks something of `given`, or has it otherwise; it may have more."""
    if isinstance(given, dict) and isinstance(kept, dict):
        for name, value in given.items():
            yield from lost(value, kept.get(name), f"{path}.{name}")
    elif isinstance(given, list) and isinstance(kept, list) and len(given) == len(kept):
        for place, (value, other) in enumerate(zip(given, kept, strict=True)):
            yield from lost(value, other, f"{path}[{place}]")
    elif given != kept:
        yield path


def test_grafanas_own_classes_know_every_field_of_the_dashboard():
    register_default_plugins()
    dashboard = Dashboard.from_json(DASHBOARD)
    assert list(lost(DASHBOARD, json.loads(JSONEncoder().encode(dashboard)))) == []
    misspelt = DASHBOARD | {"refesh": "10s"}
    kept = json.loads(JSONEncoder().encode(Dashboard.from_json(misspelt)))
    assert list(lost(misspelt, kept)) == ["dashboard.refesh"]
    assert {type(panel) for panel in dashboard.panels} == {Panel, RowPanel}


def test_panels_do_not_overlap():
    taken = set()
    for panel in DASHBOARD["panels"]:
        at = panel["gridPos"]
        cells = {(at["x"] + x, at["y"] + y) for x in range(at["w"]) for y in range(at["h"])}
        assert not cells & taken, panel["title"]
        assert max(x for x, _ in cells) < 24
        taken |= cells
    assert len({panel["id"] for panel in DASHBOARD["panels"]}) == len(DASHBOARD["panels"])
