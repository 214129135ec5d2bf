from __future__ import annotations

from typing import Any

import pytest

from deploy.demo_report import Results, Served, failures, percentile, tier_figures


def served(count: int, tier: str, **fields: Any) -> list[Served]:
    return [Served(n, 1, fields.pop("guess", 1), tier=tier, latency_ms=1.0 + n, **fields) for n in range(count)]


def good() -> dict[str, Any]:
    results = Results(50.0, models={"device": 0.9, "edge": 0.99, "cloud": 0.99})
    results.cascade = [*served(30, "device"), *served(10, "edge"), *served(5, "cloud")]
    results.paused = served(5, "edge", degraded=True)
    results.policy_applied_ms = 12.0
    results.edge_served_while_hub_down = results.tampered_refused = True
    return results.to_json()


def test_a_good_run_breaks_no_promise() -> None:
    assert failures(good()) == []


@pytest.mark.parametrize(
    ("path", "value", "words"),
    [
        (("tiers", "cloud", "requests"), 0, "cloud tier answered nothing"),
        (("cascade_accuracy",), 0.5, "below"),
        (("unanswered",), 1, "not answered"),
        (("in_time_share",), 0.99, "in time"),
        (("cloud_paused", "in_time_share"), 0.99, "paused"),
        (("cloud_paused", "degraded"), 0, "degraded"),
        (("policy_applied_ms",), 51.0, "policy"),
        (("policy_applied_ms",), 0.0, "policy"),
        (("edge_served_while_hub_down",), False, "hub was down"),
        (("tampered_refused",), False, "tampered"),
    ],
)
def test_every_broken_promise_is_named(path: tuple[str, ...], value: object, words: str) -> None:
    found = good()
    inner: Any = found
    for key in path[:-1]:
        inner = inner[key]
    inner[path[-1]] = value
    assert any(words in text for text in failures(found))


def test_an_unanswered_request_is_wrong_late_and_listed() -> None:
    results = Results(50.0, cascade=[Served(0, 1, None, error="gone", lag_ms=70.0)])
    found = results.to_json()
    assert (found["cascade_accuracy"], found["unanswered"], found["in_time_share"]) == (0.0, 1, 0.0)
    assert found["misses"][0]["loop_lag_ms"] == 70.0


def test_percentiles_are_nearest_rank_and_absent_without_requests() -> None:
    assert percentile([1.0, 2.0, 3.0, 4.0], 0.5) == 3.0
    assert percentile([1.0], 0.99) == 1.0
    assert tier_figures([], "edge") == {"requests": 0, "accuracy": None, "p50_ms": None, "p99_ms": None}
