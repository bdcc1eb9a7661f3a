"""Writes docs/metrics.md from the definitions of the metrics: `python -m docs.metrics`."""

from __future__ import annotations

from pathlib import Path

from cached_attention.metrics import METRICS, PREFIX, Metric

PAGE = Path(__file__).with_suffix(".md")

INTRODUCTION = f"""# Metrics

<!-- Written by `python -m docs.metrics` from the definitions of the metrics. -->

With `--enable-metrics`, SGLang's `/metrics` also covers the store. Every name below has the prefix `{PREFIX}`
and carries the labels of SGLang's own scheduler metrics (`model_name`, `tp_rank`, `pp_rank`, ...) in addition
to its own. As with those, one rank of a tensor-parallel group reports for all, unless the server has
`--enable-metrics-for-all-schedulers`. Values are published once a second while the scheduler runs. Counters
grow for as long as the server lives.

"""

USE = """
Prometheus 2 asks for the OpenMetrics format, in which names have no colon: there the prefix is
`sglang_cached_attention_`, as for SGLang's own metrics. If plain text is requested (`scrape_protocols:
[PrometheusText0.0.4]`, from 2.49 on), the colon stays. The dashboard accepts either.

## Dashboard, terminal, log

- `docs/grafana/cached-attention.json` is a Grafana dashboard for these metrics: *Dashboards, New, Import*, then
  choose the Prometheus that scrapes the server. `docs/grafana/prometheus.yml` is a minimal configuration for
  it. **Nobody has looked at the dashboard in Grafana yet.** The tests check that Grafana's own SDK knows each
  of its fields, that no panels overlap, and that a real Prometheus that scrapes a real server answers each of
  its queries.
- `cached-attention top http://127.0.0.1:30000` shows a running server in the terminal; `--once` prints one
  frame. The list of the conversations that were continued most comes from `/server_info`. A server with
  `--api-key` requires that key there (`--api-key`, or `SGLANG_API_KEY`). Conversations are named by a hash with
  a secret of the server process, so a name reveals nothing about the text and changes with each restart.
- Once a minute, if anything happened, a line in the server's log reports what was reused from which tier, what
  was moved, and what left each tier.

Two queries of the dashboard in Prometheus' own page (2.42 of Debian, headless Chromium), from the [load
test](benchmarks.md#does-it-stay-right-under-load) in which disk and remote store fail and recover in turn:

![Hit rate by tier, and health of disk and remote store, over ten minutes](prometheus.png)

`docs/grafana/alerts.yml` has rules for Prometheus (`rule_files`):

- a tier, disk or remote store, is out of service, and the server runs without it;
- pages were damaged: the disk or its file system changes bytes; for `remote`, another server's memory or the
  network;
- host memory has been full of pages in use for half an hour, so that others are not kept;
- saves failed;
- half of host memory has waited to be written to disk for half an hour.

On a CPU, also watch the rate of `load_wait_seconds_sum`: if it is not small compared with 1, loading is slower
than computing. On a GPU, its stream waits, which these metrics do not see.

Of a [hybrid model](models.md), the metrics cover the KV. The counters of its states or windows, which have a disk
directory and a connection to the remote store of their own, are in `/server_info`
([counters](operations.md#counters)).
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
