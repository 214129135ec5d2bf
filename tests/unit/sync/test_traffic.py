"""Bytes are counted once, under the way they came, whether a transfer goes on, is over or failed."""

from __future__ import annotations

import pytest

from models.serving.meter import delivery
from sync import states, traffic
from sync.download import Busy
from sync.errors import SyncError, Unavailable
from sync.traffic import DELTA, RESUMED, WHOLE, Traffic


class One:
    """A transfer."""

    def __init__(self) -> None:
        self.received = 0
        self.resumed = False


def test_what_is_under_way_counts_and_never_twice() -> None:
    counts, first, second = Traffic(), One(), One()
    with counts.watching(first, WHOLE):
        first.received = 10
        with counts.watching(second, DELTA):
            second.received = 5
            assert counts.received() == {WHOLE: 10, DELTA: 5}
        first.received = 20
        assert counts.received() == {WHOLE: 20, DELTA: 5}
    first.received = 99  # a thread that was given up on
    assert counts.received() == {WHOLE: 20, DELTA: 5}


def test_a_transfer_that_was_continued_is_known_when_it_begins() -> None:
    counts, going = Traffic(), One()
    with counts.watching(going, WHOLE):
        going.resumed, going.received = True, 7
        assert counts.received() == {RESUMED: 7}
    assert counts.received() == {RESUMED: 7}


def test_failures_count_by_code_and_what_is_no_error_of_ours_does_not() -> None:
    counts = Traffic()
    for error in (Unavailable("x"), Busy("x", 1), Busy("x", 1), KeyError()):
        with pytest.raises(type(error)), counts.file(), counts.attempt():
            raise error
    assert counts.attempts == counts.failures == {"unavailable": 1, "busy": 2}


def codes(error: type[SyncError] = SyncError) -> set[str]:
    return {error.code}.union(*(codes(each) for each in error.__subclasses__()))


def test_the_metrics_know_the_ways_the_states_and_the_codes() -> None:
    assert delivery.WAYS == (
        traffic.WHOLE,
        traffic.RESUMED,
        traffic.DELTA,
        traffic.BLOCKS,
        traffic.MEDIUM,
        traffic.METADATA,
    )
    assert set(delivery.STATES) == set(states.STATES)
    assert {*delivery.CODES, *delivery.SOURCE_CODES} <= codes()
