"""Maintenance windows open when their time zone says so."""

from __future__ import annotations

from datetime import UTC, datetime

import pytest

from sync.errors import Malformed
from sync.windows import Window, check_windows, is_open, next_opening


def at(text: str) -> float:
    return datetime.fromisoformat(text).replace(tzinfo=UTC).timestamp()


NIGHT = Window(start="22:00", minutes=120)
WEEKEND = Window(start="10:00", minutes=60, days=("sat", "sun"))
BERLIN = Window(start="02:30", minutes=60, zone="Europe/Berlin")
INDIA = Window(start="03:00", minutes=60, zone="+05:30")


@pytest.mark.parametrize(
    ("window", "time", "is_in"),
    [
        (NIGHT, "2026-03-04T21:59:59", False),
        (NIGHT, "2026-03-04T22:00", True),
        (NIGHT, "2026-03-04T23:59:59", True),
        (NIGHT, "2026-03-05T00:00", False),
        (Window(start="23:00", minutes=120), "2026-03-05T00:59", True),
        (WEEKEND, "2026-03-06T10:30", False),
        (WEEKEND, "2026-03-07T10:30", True),
        (Window(start="23:30", minutes=60, days=("sun",)), "2026-03-09T00:15", True),
        (INDIA, "2026-03-04T21:30", True),
        (INDIA, "2026-03-04T22:30", False),
        (BERLIN, "2026-01-10T01:30", True),
        (BERLIN, "2026-07-10T00:30", True),
        (BERLIN, "2026-07-10T01:30", False),
        (Window(start="00:00", minutes=7 * 24 * 60, days=("mon",)), "2026-03-08T23:59", True),
    ],
)
def test_a_window_is_open_from_its_start_for_its_minutes(window: Window, time: str, is_in: bool) -> None:
    assert is_open([window], at(time)) is is_in


def test_no_window_means_always_and_several_mean_any() -> None:
    assert is_open([], 0.0)
    assert is_open([WEEKEND, NIGHT], at("2026-03-04T22:30"))


def test_the_next_opening_is_found_across_a_week() -> None:
    assert next_opening([WEEKEND], at("2026-03-08T11:00")) == at("2026-03-14T10:00")
    assert next_opening([WEEKEND, NIGHT], at("2026-03-08T11:00")) == at("2026-03-08T22:00")
    assert next_opening([], 0.0) is None


def test_the_hour_that_a_clock_change_skips_still_opens_the_window_once() -> None:
    """Berlin, 29 March 2026: 02:00 becomes 03:00."""
    assert next_opening([BERLIN], at("2026-03-28T12:00")) == at("2026-03-29T01:30")
    assert next_opening([BERLIN], at("2026-03-29T01:31")) == at("2026-03-30T00:30")


@pytest.mark.parametrize(
    ("window", "field"),
    [
        (Window(start="24:00", minutes=1), "start"),
        (Window(start="1:00", minutes=1), "start"),
        (Window(start="01:00", minutes=0), "minutes"),
        (Window(start="01:00", minutes=1 << 20), "minutes"),
        (Window(start="01:00", minutes=1, days=("someday",)), "days"),
        (Window(start="01:00", minutes=1, zone="Mars/Olympus"), "zone"),
        (Window(start="01:00", minutes=1, zone="../../etc/passwd"), "zone"),
        (Window(start="01:00", minutes=1, zone="+25:00"), "zone"),
    ],
)
def test_a_window_that_cannot_be_is_refused_by_its_field(window: Window, field: str) -> None:
    with pytest.raises(Malformed, match=rf"windows\[1\]\.{field}"):
        check_windows([NIGHT, window])
    with pytest.raises(Malformed, match="at most 32"):
        check_windows([NIGHT] * 33)
