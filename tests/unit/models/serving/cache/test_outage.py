"""A server that is away is left alone, longer each time, and asked again."""

from __future__ import annotations

import sys

import pytest

from models.serving.cache.redis import FAILURES_TO_OPEN, MAX_PAUSE_SECONDS, Outage, connect


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


def test_after_three_failures_calls_stop_and_one_is_let_through_after_a_pause() -> None:
    clock = Clock()
    outage = Outage(clock, uniform=lambda low, high: high)
    assert [outage.failed() for _ in range(FAILURES_TO_OPEN)] == [False, False, True]
    assert not outage.allows()
    clock.now += 1.0
    assert outage.allows()
    assert not outage.allows()
    assert outage.succeeded()
    assert outage.allows()
    assert not outage.succeeded()


def test_pauses_grow_to_a_bound() -> None:
    clock = Clock()
    outage = Outage(clock, uniform=lambda low, high: high)
    for _ in range(200):
        outage.failed()
    clock.now += MAX_PAUSE_SECONDS - 0.1
    assert not outage.allows()
    clock.now += 0.2
    assert outage.allows()


def test_a_success_between_failures_forgets_them() -> None:
    outage = Outage(Clock())
    for _ in range(10):
        outage.failed()
        outage.succeeded()
    assert outage.allows()


def test_a_missing_package_is_named_with_what_installs_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "redis.asyncio", None)
    with pytest.raises(ModuleNotFoundError, match=r"tierline\[redis\]"):
        connect("redis://127.0.0.1", timeout=1.0, connections=1)


def test_a_url_that_is_none_is_refused_when_it_is_given() -> None:
    with pytest.raises(ValueError, match="URL"):
        connect("127.0.0.1:6379", timeout=1.0, connections=1)
