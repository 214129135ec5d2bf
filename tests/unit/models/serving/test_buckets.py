from __future__ import annotations

import pytest

from models.serving.buckets import Bucket, Recent


def test_a_burst_then_the_rate_and_the_wait_is_exact() -> None:
    bucket = Bucket(10.0, 3)
    assert [bucket.take(5.0) for _ in range(3)] == [0.0] * 3
    wait = bucket.take(5.0)
    assert wait == pytest.approx(0.1)
    assert bucket.is_empty(5.0)
    assert bucket.take(5.0 + wait * 0.99) > 0.0
    assert bucket.take(5.0 + wait * 1.000001) == 0.0
    assert not bucket.is_empty(6.0)


def test_being_refused_costs_nothing() -> None:
    bucket = Bucket(1.0, 1)
    bucket.take(0.5)
    assert [bucket.take(1.0) for _ in range(100)] == [0.5] * 100
    assert bucket.take(1.5) == 0.0


def test_idle_time_fills_no_more_than_the_burst() -> None:
    bucket = Bucket(100.0, 2)
    bucket.take(0.0)
    assert [bucket.take(1e6) == 0.0 for _ in range(4)] == [True, True, False, False]


@pytest.mark.parametrize(("rate", "burst"), [(0.25, 1), (1.0, 1), (2.5, 3), (100.0, 100)])
def test_a_burst_that_is_not_given_is_one_seconds_worth(rate: float, burst: int) -> None:
    bucket = Bucket(rate)
    assert [bucket.take(9.0) == 0.0 for _ in range(burst + 1)] == [True] * burst + [False]


def test_over_a_long_time_the_rate_holds_whatever_the_rhythm() -> None:
    bucket = Bucket(7.0, 5)
    taken = sum(bucket.take(1.0 + step / 1000) == 0.0 for step in range(100_000))
    assert taken == pytest.approx(7 * 100 + 5, abs=1)


def test_the_least_recently_used_is_forgotten() -> None:
    made: list[str] = []
    recent: Recent[str, list[str]] = Recent(lambda key: made.append(key) or [key], 2)
    first = recent["a"]
    recent["b"]
    assert recent["a"] is first
    recent["c"]
    assert recent.known("b") is None
    assert recent.known("a") is first
    assert len(recent) == 2
    assert made == ["a", "b", "c"]
