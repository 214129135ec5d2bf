from __future__ import annotations

import pytest

from models.serving.estimates import MISSES_TO_OPEN, Breaker, Estimate


def test_an_estimate_follows_what_it_sees_and_forgets_when_stale() -> None:
    estimate = Estimate(0.005, 0.002)
    assert estimate.get(0.0) == (0.005, 0.002)
    for step in range(200):
        estimate.add(0.020, step * 0.01)
    mean, dev = estimate.get(2.0)
    assert mean == pytest.approx(0.020, rel=0.01)
    assert dev < 0.001
    assert estimate.get(13.0) == (0.005, 0.002)


def test_a_stale_estimate_starts_again_from_its_prior() -> None:
    estimate = Estimate(0.005, 0.002)
    estimate.add(1.0, 0.0)
    estimate.add(0.005, 100.0)
    assert estimate.get(100.0)[0] == pytest.approx(0.005)


def test_the_breaker_opens_after_misses_in_a_row_and_one_answer_closes_it() -> None:
    breaker = Breaker()
    assert [breaker.miss(float(n)) for n in range(MISSES_TO_OPEN)] == [False] * (MISSES_TO_OPEN - 1) + [True]
    assert breaker.is_open
    assert breaker.succeed(9.0)
    assert not breaker.is_open


def test_an_answer_between_misses_keeps_the_breaker_closed() -> None:
    breaker = Breaker()
    for n in range(20):
        breaker.miss(float(n))
        if n % (MISSES_TO_OPEN - 1) == 0:
            breaker.succeed(float(n))
    assert not breaker.is_open


def test_probes_come_soon_while_open_and_once_a_second_while_idle() -> None:
    breaker = Breaker()
    assert breaker.seconds_to_probe(0.0) == 0.0
    breaker.succeed(10.0)
    assert breaker.seconds_to_probe(10.4) == pytest.approx(0.6)
    for _ in range(MISSES_TO_OPEN):
        breaker.miss(11.0)
    assert breaker.seconds_to_probe(11.0) == pytest.approx(0.25)
    breaker.miss(11.3)
    assert breaker.seconds_to_probe(11.3) == pytest.approx(0.5)


def test_a_late_answer_pushes_the_estimate_up_never_down() -> None:
    estimate = Estimate(0.020, 0.004)
    estimate.add_late(0.001, 0.0)
    assert estimate.get(0.0)[0] > 0.020
    estimate.add_late(0.5, 0.1)
    assert estimate.get(0.1)[0] > 0.06


def test_late_answers_in_a_row_ask_for_a_probe_and_only_the_probe_opens_the_breaker() -> None:
    breaker = Breaker()
    assert [breaker.late(float(n)) for n in range(MISSES_TO_OPEN)] == [False] * (MISSES_TO_OPEN - 1) + [True]
    assert not breaker.is_open
    assert breaker.seconds_to_probe(5.0) == 0.0
    assert breaker.probe_missed(5.5)
    assert breaker.is_open
    assert breaker.seconds_to_probe(5.5) == pytest.approx(0.25)


def test_a_probe_that_is_answered_ends_the_suspicion() -> None:
    breaker = Breaker()
    for n in range(MISSES_TO_OPEN):
        breaker.late(float(n))
    breaker.succeed(5.0)
    assert not breaker.is_suspect
    assert not breaker.probe_missed(6.0)
    assert not breaker.is_open
