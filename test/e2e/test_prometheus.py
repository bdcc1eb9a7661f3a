"""The dashboard's queries, asked of a real Prometheus that scrapes a real server."""

from __future__ import annotations

import json
import math
import shutil
import subprocess
import time
import urllib.error
import urllib.parse
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from benchmark.server import DIRECT, Server, free_port

GRAFANA = Path(__file__).parents[2] / "docs" / "grafana"
PROGRAM = shutil.which("prometheus")
PATIENCE = 120.0
CONVERSATIONS, TURNS = 8, 4
HITS = 'sum({__name__=~"sglang[:_]cached_attention_hit_tokens_total"})'
FILLED_IN = {"$__rate_interval": "10m", "$model": ".*", "$instance": ".*"}
"""As Grafana does."""


def expressions() -> list[str]:
    panels = json.loads((GRAFANA / "cached-attention.json").read_text())["panels"]
    return [target["expr"] for panel in panels for target in panel.get("targets", ())]


class Prometheus:
    """With the configuration that the documentation gives, but for the server's address and the interval."""

    def __init__(self, server: Server, directory: Path) -> None:
        config = yaml.safe_load((GRAFANA / "prometheus.yml").read_text())
        (job,) = config["scrape_configs"]
        job |= {"scrape_interval": "1s", "scrape_timeout": "1s"}
        job["static_configs"] = [{"targets": [urllib.parse.urlsplit(server.url).netloc]}]
        (directory / "prometheus.yml").write_text(yaml.safe_dump(config))
        address = f"127.0.0.1:{free_port()}"
        self._url = f"http://{address}/api/v1/query"
        options = {
            "config.file": directory / "prometheus.yml",
            "storage.tsdb.path": directory / "data",
            "web.listen-address": address,
        }
        with (directory / "log").open("wb") as log:
            self.process = subprocess.Popen(
                [str(PROGRAM), *(f"--{name}={value}" for name, value in options.items())], stdout=log, stderr=log
            )

    def ask(self, query: str) -> list[float]:
        """A value per time series; none while Prometheus is not there yet.

        Raises:
            HTTPError: it does not take the query.
        """
        url = f"{self._url}?{urllib.parse.urlencode({'query': query})}"
        try:
            with DIRECT.open(url, timeout=30) as response:
                result = json.loads(response.read())["data"]["result"]
        except urllib.error.HTTPError:
            raise
        except OSError:
            return []
        return [float(series["value"][1]) for series in result]

    def eventually(self, query: str, holds: Callable[[list[float]], bool]) -> list[float]:
        deadline = time.monotonic() + PATIENCE
        while not holds(values := self.ask(query)):
            assert time.monotonic() < deadline, f"{query}: {values}"
            time.sleep(0.2)
        return values


@pytest.fixture(scope="module")
def scraped(models: Any, start: Any, town: Any, disk_tier: Any, tmp_path_factory: Any) -> Iterator[Prometheus]:
    """Has seen a server before and after conversations from every tier, and every hit that was reported."""
    if PROGRAM is None:
        pytest.skip("no `prometheus` on the path (Debian has a package)")
    disk = disk_tier(tmp_path_factory.mktemp("disk"), "2GB")
    args = ("--max-total-tokens", "2048", *disk, "--enable-metrics")
    with start(models(), *args, host_size="20MB") as server:
        talk = town(CONVERSATIONS)
        talk.hold(server, 1)
        prometheus = Prometheus(server, tmp_path_factory.mktemp("prometheus"))
        try:
            prometheus.eventually(HITS, bool)
            talk.hold(server, TURNS - 1, (1, 3))
            assert min(talk.cached("host"), talk.cached("storage")) > 0
            reported = sum(talk.cached(tier) for tier in ("device", "host", "storage"))
            prometheus.eventually(HITS, lambda values: values == [reported])
            yield prometheus
        finally:
            prometheus.process.kill()
            prometheus.process.wait()


@pytest.mark.parametrize("expression", expressions())
def test_every_query_of_the_dashboard_has_an_answer(scraped: Prometheus, expression: str) -> None:
    for name, value in FILLED_IN.items():
        expression = expression.replace(name, value)
    assert "$" not in expression
    values = scraped.eventually(expression, bool)
    assert all(map(math.isfinite, values)), values
