"""Writes docs/metrics.md from the definitions of the metrics: `python -m docs.metrics`."""

from __future__ import annotations

from pathlib import Path

from cached_attention.metrics import METRICS, PREFIX, Metric

PAGE = Path(__file__).with_suffix(".md")

INTRODUCTION = f"""# Metrics

<!-- Written by `python -m docs.metrics` from the definitions of the metrics. -->

With `--enable-metrics`, SGLang's `/metrics` tells of the store as well. Every name below is prefixed `{PREFIX}`
and carries the labels of SGLang's own scheduler metrics (`model_name`, `tp_rank`, `pp_rank`, ...) beside its own.
As with those, one rank of a tensor-parallel group speaks for all, unless the server has
`--enable-metrics-for-all-schedulers`. Values are published once a second, while the scheduler runs. Counters grow
for as long as the server lives.

"""

USE = """
Prometheus 2 asks for the OpenMetrics format, in which a name has no colon: there it is
`sglang_cached_attention_...`, like SGLang's own. Where it is asked for plain text
(`scrape_protocols: [PrometheusText0.0.4]`, from 2.49 on) the colon stays. The dashboard takes either.

## A dashboard, a terminal, the log

- `docs/grafana/cached-attention.json` is a Grafana dashboard over these metrics: *Dashboards, New, Import*, and
  choose the Prometheus that scrapes the server. `docs/grafana/prometheus.yml` is the least that it needs. It was
  made without a Grafana at hand: **nobody has looked at it in one yet**. The tests hold it to this: Grafana's
  own SDK knows each of its fields, no panels overlap, and a real Prometheus that scrapes a real server has an
  answer to each of its queries.
- `cached-attention top http://127.0.0.1:30000` shows a running server in the terminal; `--once` prints one frame.
  The conversations continued most come from `/server_info`; a server with `--api-key` wants it there
  (`--api-key`, or `SGLANG_API_KEY`). They are named by a hash with a secret of the server process: a name tells
  nothing of the text, and is another one after a restart.
- Once a minute, if anything happened, a line in the server's log says what was reused from where, what moved, and
  what left each tier.

Two queries of the dashboard in Prometheus' own page (2.42 of Debian, a headless Chromium), from the
[load test](benchmarks.md#does-it-stay-right-under-load) in which disk and remote store fail and heal in turn:

![Hit rate by tier, and health of disk and remote store, over ten minutes](prometheus.png)

Worth an alert:

- `tier_healthy` is 0: that tier, disk or remote store, is out of service, and the server goes on without it.
- `checksum_failures_total` grows: the disk or its file system changes bytes; or, of `remote`, another server's
  memory or the network.
- `declined_pages_total` grows for long: host memory is full of pages in use.
- The rate of `load_wait_seconds_sum` is not small against 1: loading is slower than computing.
"""


def render() -> str:
    rows = "\n".join(map(_row, METRICS))
    return f"{INTRODUCTION}| name | kind | labels | meaning |\n|---|---|---|---|\n{rows}\n{USE}"


def _row(metric: Metric) -> str:
    labels = ", ".join(f"`{label}`" for label in metric.labels)
    return f"| `{metric.name}` | {metric.kind} | {labels} | {metric.help} |"


def main() -> None:
    PAGE.write_text(render())
    print(f"{PAGE}: {len(METRICS)} metrics")


if __name__ == "__main__":
    main()
