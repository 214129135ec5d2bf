from __future__ import annotations

import pytest

from sync.chaos.units import FOREVER, seconds, signed_seconds, size


@pytest.mark.parametrize(
    ("text", "value"), [("200ms", 0.2), ("10s", 10.0), ("1.5m", 90.0), ("2h", 7200.0), ("400d", 34_560_000.0)]
)
def test_durations(text: str, value: float) -> None:
    assert seconds(text) == pytest.approx(value)


def test_a_clock_may_jump_back_but_nothing_lasts_less_than_nothing() -> None:
    assert signed_seconds("-2h") == -7200
    assert seconds("forever") == FOREVER
    with pytest.raises(ValueError, match="less than nothing"):
        seconds("-1s")


@pytest.mark.parametrize(("text", "value"), [("64M", 64 << 20), ("500k", 500 << 10), ("1024", 1024), ("1GiB", 1 << 30)])
def test_sizes(text: str, value: int) -> None:
    assert size(text) == value


@pytest.mark.parametrize("text", ["", "10", "s", "1y", "ten s", "1s "[::-1]])
def test_what_is_no_duration_is_named(text: str) -> None:
    with pytest.raises(ValueError, match="is not a duration"):
        signed_seconds(text)


@pytest.mark.parametrize("text", ["", "0", "-1", "5T"])
def test_what_is_no_size_is_named(text: str) -> None:
    with pytest.raises(ValueError, match="is not a size"):
        size(text)
