"""`python -m models.serving.meter.document > docs/metrics.md`: the catalogue as a page."""

from __future__ import annotations

import sys

from models.serving.meter.catalogue import ENTRIES, Entry
from models.serving.meter.histogram import LAYOUTS
from models.serving.meter.prometheus import name_of

_BEFORE = """# Metrics

What a serving process tells about itself at `GET /metrics` (port 8002), in Prometheus' text format. This page is made from
`models/serving/meter/catalogue.py` by `python -m models.serving.meter.document > docs/metrics.md`.

Histograms of seconds have the edges {seconds}; those of rows {rows}.
Labels are bounded: what is beyond a cap is counted under the label value `other`, and `telemetry_series_dropped_total` says so.
`GET /traces` on the same port lists the last spans of requests that were traced or went wrong, newest first.

## Is it answering, and in time?

- answered per second: `sum by (model) (rate(inference_request_count_total[5m]))`
- share that failed, the callers' own mistakes left out:
  `sum(rate(inference_request_errors_total{{error=~"engine_failure|unexpected|overloaded|not_ready|deadline_exceeded"}}[5m]))
  / (sum(rate(inference_request_count_total[5m])) + sum(rate(inference_request_errors_total[5m])))`
- share within 10 ms, exactly:
  `sum(rate(inference_request_e2e_duration_seconds_bucket{{le="0.01"}}[5m])) / sum(rate(inference_request_count_total[5m]))`

## All of them

| name | kind | labels | what it says | when it looks bad |
|---|---|---|---|---|
"""


def render() -> str:
    rows = "".join(_row(entry) for entry in ENTRIES)
    return _BEFORE.format(seconds=_edges("s"), rows=_edges("{row}")) + rows


def _row(entry: Entry) -> str:
    labels = ", ".join(f"`{label}`" for label in entry.labels)
    return f"| `{name_of(entry)}` | {entry.kind} | {labels} | {entry.text} | {entry.bad} |\n"


def _edges(unit: str) -> str:
    return ", ".join(f"{edge:g}" for edge in LAYOUTS[unit].exported)


if __name__ == "__main__":
    sys.stdout.write(render())
