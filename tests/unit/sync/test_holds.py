"""A hold lasts as long as it says, never longer than the limit, and across a restart when it was kept."""

from __future__ import annotations

from pathlib import Path

import pytest

from sync.errors import Malformed
from sync.holds import MAX_HOLDS, Holds
from sync.state import StateStore
from sync.testing import FakeClock


@pytest.fixture
def clock() -> FakeClock:
    return FakeClock()


@pytest.fixture
def holds(clock: FakeClock) -> Holds:
    return Holds(clock, lambda: 100.0)


def test_a_hold_ends_when_it_is_released_or_its_time_is_over(holds: Holds, clock: FakeClock) -> None:
    first, second = holds.hold("robot in motion", 10), holds.hold("line runs", 20)
    assert holds.current() == second
    assert holds.release(second.id)
    assert holds.current() == first
    clock.advance(10)
    assert holds.current() is None
    assert not holds.release(first.id)


def test_a_hold_never_lasts_longer_than_the_limit(holds: Holds, clock: FakeClock) -> None:
    assert holds.hold("for ever").until == clock.monotonic() + 100
    assert holds.hold("too long", 1e9).until == clock.monotonic() + 100


@pytest.mark.parametrize("seconds", [0.0, -1.0, float("nan"), float("inf")])
def test_a_length_that_is_none_is_refused(holds: Holds, seconds: float) -> None:
    with pytest.raises(Malformed, match="seconds"):
        holds.hold("robot", seconds)


def test_a_reason_is_needed_and_bounded(holds: Holds) -> None:
    for reason in ("", "x" * 201, "line\nbreak"):
        with pytest.raises(Malformed, match="reason"):
            holds.hold(reason)


def test_there_are_only_so_many_at_once(holds: Holds, clock: FakeClock) -> None:
    for _ in range(MAX_HOLDS):
        holds.hold("one of many", 5)
    with pytest.raises(Malformed, match="64"):
        holds.hold("one too many")
    clock.advance(6)
    holds.hold("there is room again")


async def test_a_hold_that_was_kept_is_there_after_a_restart_for_what_is_left_of_it(
    tmp_path: Path, clock: FakeClock
) -> None:
    state = StateStore(tmp_path / "state.db")
    before = Holds(clock, lambda: 100.0, state)
    kept, other = before.hold("robot in motion", 50), before.hold("forgotten", 50)
    await before.keep(kept)
    await before.keep(other)
    await before.forget(other.id)
    clock.advance(20)
    after = Holds(clock, lambda: 100.0, state)
    after.restore()
    assert [hold.id for hold in after.all()] == [kept.id]
    assert after.all()[0].until - clock.monotonic() == pytest.approx(30)
    clock.advance(31)
    assert after.current() is None
    state.close()


async def test_a_clock_that_jumped_back_does_not_make_a_kept_hold_longer_than_the_limit(
    tmp_path: Path, clock: FakeClock
) -> None:
    state = StateStore(tmp_path / "state.db")
    before = Holds(clock, lambda: 100.0, state)
    await before.keep(before.hold("robot in motion", 50))
    earlier = FakeClock(wall=clock.wall() - 1e6)
    after = Holds(earlier, lambda: 100.0, state)
    after.restore()
    assert after.all()[0].until - earlier.monotonic() == pytest.approx(100)
    state.close()


async def test_kept_holds_that_ended_by_themselves_do_not_pile_up(clock: FakeClock, tmp_path: Path) -> None:
    state = StateStore(tmp_path / "state.db")
    holds = Holds(clock, lambda: 100.0, state)
    for _ in range(20):
        made = holds.hold("every minute", 10)
        await holds.keep(made)
        clock.advance(60)
    assert [name for name, _, _ in state.holds()] == [made.id]
    state.close()
