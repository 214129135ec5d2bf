"""A retry is made when it can help, when the server allows it, and when there is time and budget for it."""

from __future__ import annotations

import random

import pytest

from models.client.retries import RESERVE, Retries, RetryBudget
from models.errors import (
    DeadlineExceeded,
    EngineFailure,
    InvalidRequest,
    NotReady,
    Overloaded,
    TierlineError,
    Unreachable,
)


def budget(**options: float) -> RetryBudget:
    return RetryBudget(Retries(**options), chance=random.Random(1))  # type: ignore[arg-type]


@pytest.mark.parametrize("error", [NotReady("x"), Unreachable("x"), Overloaded("x", 0.5)])
def test_what_time_may_heal_is_tried_again(error: TierlineError) -> None:
    assert budget().pause(0, error, 5.0) is not None


@pytest.mark.parametrize("error", [InvalidRequest("x"), EngineFailure("x"), DeadlineExceeded("x")])
def test_what_time_does_not_heal_is_not(error: TierlineError) -> None:
    assert budget().pause(0, error, 5.0) is None


def test_a_call_has_its_tries_and_no_more() -> None:
    decide = budget(most=2)
    assert [decide.pause(tried, NotReady("x"), 5.0) is None for tried in range(4)] == [False, False, True, True]


def test_nobody_comes_back_before_the_server_said_so_and_not_all_at_once() -> None:
    decide = budget()
    pauses = [decide.pause(0, Overloaded("x", 2.0), 60.0) for _ in range(8)]
    assert all(pause is not None and 2.0 <= pause <= 2.5 for pause in pauses)
    assert len(set(pauses)) == 8


def test_a_pause_that_would_use_up_the_time_is_not_made() -> None:
    assert budget().pause(0, Overloaded("x", 2.0), 1.9) is None


def test_pauses_grow_to_their_limit() -> None:
    decide = budget(most=50, pause=0.1, longest_pause=0.4)
    assert all((decide.pause(40, NotReady("x"), 5.0) or 0) <= 0.4 for _ in range(5))
    assert all((decide.pause(0, NotReady("x"), 5.0) or 0) <= 0.1 for _ in range(5))


def test_over_time_only_a_share_of_calls_is_tried_again() -> None:
    decide = budget(most=1, share=0.1)
    made = 0
    for _ in range(1000):
        decide.begin()
        made += decide.pause(0, Unreachable("x"), 5.0) is not None
    assert 100 <= made <= 100 + RESERVE
