"""All transfers together keep to the rate, also to one that is set while they run."""

from __future__ import annotations

import pytest

from sync.pace import BURST_SECONDS, Pace


class Time:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def test_bytes_are_paid_for_in_time_by_all_together() -> None:
    time = Time()
    pace = Pace(1_000.0, time)
    waits = [pace.take(500) for _ in range(4)]
    assert waits == pytest.approx([0.5 - BURST_SECONDS, 1.0 - BURST_SECONDS, 1.5 - BURST_SECONDS, 2.0 - BURST_SECONDS])
    time.now = 100.0
    assert pace.take(1_000) == pytest.approx(1 - BURST_SECONDS), "a pause must not be followed by a flood"


def test_a_limit_set_or_lifted_counts_at_once() -> None:
    time = Time()
    pace = Pace(None, time)
    assert pace.take(10**9) == 0.0
    assert pace.chunk(262_144) == 262_144
    pace.limit(10_000.0)
    assert pace.take(10_000) == pytest.approx(1 - BURST_SECONDS)
    assert pace.chunk(262_144) == 2_500
    pace.limit(None)
    assert pace.take(10**9) == 0.0
