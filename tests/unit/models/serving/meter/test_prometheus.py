"""The page a scraper reads: every line in the grammar of the text format, nothing a label can break."""

from __future__ import annotations

import re

import pytest

from models.serving.meter.catalogue import ENTRIES
from models.serving.meter.prometheus import name_of, render
from models.serving.meter.registry import Registry

# Prometheus, "Exposition formats", text format 0.0.4.
NAME = r"[a-zA-Z_:][a-zA-Z0-9_:]*"
LABEL = r'[a-zA-Z_][a-zA-Z0-9_]*="(?:[^"\\\n]|\\["\\n])*"'
VALUE = r"(?:[+-]Inf|NaN|[+-]?[0-9.]+(?:e[+-]?[0-9]+)?)"
SAMPLE = re.compile(rf"({NAME})(?:\{{({LABEL}(?:,{LABEL})*)\}})? ({VALUE})")
COMMENT = re.compile(rf"# (HELP|TYPE) ({NAME}) (.+)")


def page(registry: Registry) -> dict[str, dict[str, float]]:
    """Sample name -> labels as written -> value, of a page whose grammar and order have been checked."""
    text = render(registry.collect()).decode()
    assert text.endswith("\n")
    found: dict[str, dict[str, float]] = {}
    kinds: dict[str, str] = {}
    for line in text.removesuffix("\n").split("\n"):
        comment = COMMENT.fullmatch(line)
        if comment:
            if comment[1] == "TYPE":
                assert comment[2] not in kinds, "announced twice"
                kinds[comment[2]] = comment[3]
                current = comment[2]
            continue
        sample = SAMPLE.fullmatch(line)
        assert sample, line
        suffixes = ("_bucket", "_sum", "_count") if kinds[current] == "histogram" else ("",)
        assert sample[1] in [current + suffix for suffix in suffixes], "a sample outside its family"
        series = found.setdefault(sample[1], {})
        assert (sample[2] or "") not in series, "the same series twice"
        series[sample[2] or ""] = float(sample[3])
    return found


def test_counters_gauges_and_histograms_are_written_as_the_format_wants(registry: Registry) -> None:
    registry.counter("inference.request.errors", model="m", error="not_found").add(3)
    registry.read("process.uptime", lambda: 1.5)
    histogram = registry.histogram("runtime.event_loop.lag")
    for value in (0.004, 0.005, 0.006, 99.0):
        histogram.observe(value)
    found = page(registry)
    assert found["inference_request_errors_total"] == {'model="m",error="not_found"': 3}
    assert found["process_uptime_seconds"] == {"": 1.5}
    buckets = found["runtime_event_loop_lag_seconds_bucket"]
    assert (buckets['le="0.005"'], buckets['le="0.01"'], buckets['le="60.0"'], buckets['le="+Inf"']) == (2, 3, 3, 4)
    assert list(buckets.values()) == sorted(buckets.values())
    assert found["runtime_event_loop_lag_seconds_count"] == {"": 4}
    assert found["runtime_event_loop_lag_seconds_sum"][""] == pytest.approx(99.015)


@pytest.mark.parametrize(
    ("model", "written"),
    [
        ('a"b', r"a\"b"),
        ("a\\b", r"a\\b"),
        ("a\nb", r"a\nb"),
        ('"} 1\nevil 2\n#', r"\"} 1\nevil 2\n#"),
        ("größe 漢", "größe 漢"),
        ("a\rb\u2028c", "a\rb\u2028c"),
        ("\ud800", "?"),
        ("", ""),
    ],
)
def test_no_label_can_end_its_line_or_forge_another(registry: Registry, model: str, written: str) -> None:
    registry.counter("inference.request.degraded", model=model).add()
    registry.histogram("inference.request.e2e.duration", model=model, version="1", tier="edge").observe(0.001)
    found = page(registry)
    assert found["inference_request_degraded_total"] == {f'model="{written}"': 1}
    assert len(found) == 5  # its three parts, the counter above, and the dropped series


@pytest.mark.parametrize(
    ("value", "written"), [(float("nan"), "NaN"), (float("inf"), "+Inf"), (-float("inf"), "-Inf"), (1e-7, "1e-07")]
)
def test_odd_numbers_have_the_formats_words(registry: Registry, value: float, written: str) -> None:
    registry.read("process.uptime", lambda: value)
    assert f"\nprocess_uptime_seconds {written}\n" in render(registry.collect()).decode()


def test_a_metric_nobody_has_bound_is_not_mentioned(registry: Registry) -> None:
    registry.read("process.memory.usage", lambda: None)
    assert set(page(registry)) == {"telemetry_series_dropped_total"}


def test_names_are_valid_and_no_two_metrics_share_one() -> None:
    names = [name_of(entry) for entry in ENTRIES]
    assert len(set(names)) == len(names)
    for entry, name in zip(ENTRIES, names, strict=True):
        assert re.fullmatch(r"[a-z][a-z0-9_]*", name)
        assert name.endswith("_total") == (entry.kind == "counter")
