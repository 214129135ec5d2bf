"""Histograms: exact where it was promised, close everywhere else, and nothing lost between threads."""

from __future__ import annotations

import threading
from math import isnan

import numpy as np
import pytest

from models.serving.meter.histogram import FOLD, SECONDS, SIZES, Histogram


def of(values: list[float], layout=SECONDS) -> Histogram:
    histogram = Histogram(layout)
    for value in values:
        histogram.observe(value)
    return histogram


@pytest.mark.parametrize("edge", [0.005, 0.010, 0.025, 0.050, 0.100])
def test_what_callers_are_promised_is_counted_exactly(edge: float) -> None:
    below, above = np.nextafter(edge, 0.0), np.nextafter(edge, 1.0)
    snapshot = of([below, edge, above]).snapshot()
    assert snapshot.cumulative()[SECONDS.exported.index(edge)] == 2


def test_a_size_that_is_an_edge_belongs_to_it() -> None:
    snapshot = of([float(1 << power) for power in range(11)], SIZES).snapshot()
    assert snapshot.cumulative() == list(range(1, 12))


@pytest.mark.parametrize("share", [0.01, 0.5, 0.9, 0.99, 0.999])
def test_quantiles_are_within_five_percent_of_the_exact_ones(share: float) -> None:
    values = np.random.default_rng(7).lognormal(-7.0, 1.5, 20_001)
    exact = float(np.quantile(values, share, method="inverted_cdf"))
    assert of(list(values)).snapshot().quantile(share) == pytest.approx(exact, rel=0.05)


def test_there_is_no_quantile_of_nothing() -> None:
    assert isnan(Histogram(SECONDS).snapshot().quantile(0.5))


@pytest.mark.parametrize("value", [0.0, -1e-9, 1e-12, 60.0, 61.0, 1e9, float("inf")])
def test_values_beyond_the_layout_are_counted_at_its_ends(value: float) -> None:
    snapshot = of([value]).snapshot()
    assert snapshot.count == 1
    assert snapshot.cumulative()[-1] == (1 if value <= 60.0 else 0)
    assert snapshot.quantile(0.5) > 0.0


@pytest.mark.parametrize("count", [0, 1, FOLD - 1, FOLD, FOLD + 1, 3 * FOLD])
def test_values_not_yet_sorted_in_are_part_of_every_snapshot(count: int) -> None:
    histogram = of([0.5] * count)
    for _ in range(2):
        snapshot = histogram.snapshot()
        assert (snapshot.count, snapshot.total) == (count, pytest.approx(0.5 * count))


def test_a_snapshot_does_not_change_afterwards() -> None:
    histogram = of([0.001])
    before = histogram.snapshot()
    histogram.observe(0.001)
    histogram.snapshot()
    assert before.count == 1


def test_no_value_is_lost_or_counted_twice_when_threads_observe_at_once() -> None:
    histogram = Histogram(SECONDS)

    def observe() -> None:
        for _ in range(20_000):
            histogram.observe(1.0)

    threads = [threading.Thread(target=observe) for _ in range(4)]
    for thread in threads:
        thread.start()
    while any(thread.is_alive() for thread in threads):
        histogram.snapshot()
    for thread in threads:
        thread.join()
    snapshot = histogram.snapshot()
    assert (snapshot.count, snapshot.total) == (80_000, 80_000.0)
