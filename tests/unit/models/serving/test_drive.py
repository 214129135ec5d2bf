"""A coroutine started by hand behaves as it would in a Task."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Coroutine
from typing import Any

import pytest
import uvloop

from models.serving.drive import Driven, Parked, drive

Scenario = Callable[[], Awaitable[None]]


class Outcome:
    def __init__(self) -> None:
        self.calls: list[tuple[object, BaseException | None]] = []
        self.arrived = asyncio.Event()

    def __call__(self, result: object, error: BaseException | None) -> None:
        self.calls.append((result, error))
        self.arrived.set()

    async def only(self) -> tuple[object, BaseException | None]:
        await asyncio.wait_for(self.arrived.wait(), 2)
        assert len(self.calls) == 1
        return self.calls[0]


def start(coroutine: Coroutine[Any, Any, object]) -> tuple[Driven[object] | None, Outcome]:
    outcome = Outcome()
    return drive(coroutine, outcome, asyncio.get_running_loop()), outcome


async def at_once(value: object) -> object:
    return value


async def failing(error: BaseException) -> object:
    raise error


async def inline_result_needs_no_task() -> None:
    task, outcome = start(at_once(7))
    assert task is None
    assert outcome.calls == [(7, None)]


async def inline_error_is_delivered() -> None:
    error = ValueError("no")
    task, outcome = start(failing(error))
    assert task is None
    assert outcome.calls == [(None, error)]


async def inline_cancellation_is_delivered() -> None:
    task, outcome = start(failing(asyncio.CancelledError()))
    assert task is None
    assert isinstance(outcome.calls[0][1], asyncio.CancelledError)


async def suspended_result_comes_from_a_task() -> None:
    future = asyncio.get_running_loop().create_future()

    async def twice() -> object:
        first = await future
        await asyncio.sleep(0)
        return first, asyncio.current_task()

    task, outcome = start(twice())
    assert task is not None
    assert not outcome.calls
    future.set_result("x")
    assert await outcome.only() == (("x", task._task), None)


async def a_parked_coroutine_goes_on_when_its_result_is_given() -> None:
    parked: Parked[int] = Parked(asyncio.get_running_loop())

    async def waiting() -> int:
        return await parked + 1

    driven, outcome = start(waiting())
    assert driven is not None
    assert not outcome.calls
    parked.give(41)
    assert outcome.calls == [(42, None)]
    parked.give(7)
    assert len(outcome.calls) == 1


async def a_parked_coroutine_sees_the_error_and_may_park_again() -> None:
    loop = asyncio.get_running_loop()
    first: Parked[int] = Parked(loop)
    second: Parked[int] = Parked(loop)

    async def waiting() -> int:
        try:
            return await first
        except ValueError:
            return await second

    _, outcome = start(waiting())
    first.fail(ValueError("no"))
    assert not outcome.calls
    second.give(2)
    assert outcome.calls == [(2, None)]


async def a_parked_coroutine_is_cancelled_at_once_and_its_giver_is_told() -> None:
    dropped: list[str] = []
    parked: Parked[int] = Parked(asyncio.get_running_loop(), lambda: dropped.append("x"))

    async def waiting() -> int:
        return await parked

    driven, outcome = start(waiting())
    assert driven is not None
    driven.cancel()
    assert isinstance(outcome.calls[0][1], asyncio.CancelledError)
    assert dropped == ["x"]
    parked.give(1)
    assert len(outcome.calls) == 1


async def cancelling_what_has_ended_changes_nothing() -> None:
    parked: Parked[int] = Parked(asyncio.get_running_loop())

    async def waiting() -> int:
        return await parked

    driven, outcome = start(waiting())
    assert driven is not None
    parked.give(1)
    driven.cancel()
    assert outcome.calls == [(1, None)]


async def after_parking_a_coroutine_may_still_suspend_on_a_future() -> None:
    parked: Parked[int] = Parked(asyncio.get_running_loop())

    async def waiting() -> int:
        first = await parked
        await asyncio.sleep(0)
        return first

    _, outcome = start(waiting())
    parked.give(3)
    assert await outcome.only() == (3, None)


async def a_task_may_await_what_is_parked() -> None:
    loop = asyncio.get_running_loop()
    given: Parked[int] = Parked(loop)
    late: Parked[int] = Parked(loop)

    async def waiting(parked: Parked[int]) -> int:
        return await parked

    task, cancelled = loop.create_task(waiting(given)), loop.create_task(waiting(late))
    await asyncio.sleep(0)
    given.give(5)
    assert await task == 5
    cancelled.cancel()
    done, _ = await asyncio.wait((cancelled,), timeout=1)
    assert done
    assert cancelled.cancelled()
    assert late.cancelled()


async def the_first_futures_error_reaches_the_coroutine() -> None:
    future = asyncio.get_running_loop().create_future()

    async def catching() -> object:
        try:
            await future
        except OSError:
            await asyncio.sleep(0)
            return "caught"
        return "missed"

    _, outcome = start(catching())
    future.set_exception(OSError())
    assert await outcome.only() == ("caught", None)


async def the_first_futures_error_may_be_the_end() -> None:
    future = asyncio.get_running_loop().create_future()

    async def catching() -> object:
        try:
            return await future
        except OSError:
            return "caught"

    _, outcome = start(catching())
    future.set_exception(OSError())
    assert await outcome.only() == ("caught", None)


async def cancelling_before_the_task_began_reaches_the_coroutine() -> None:
    await _cancelled(turns=0)


async def cancelling_while_it_waits_reaches_the_coroutine() -> None:
    await _cancelled(turns=3)


async def _cancelled(turns: int) -> None:
    future = asyncio.get_running_loop().create_future()
    cleaned = []

    async def cleaning() -> object:
        try:
            await future
        finally:
            cleaned.append(True)

    task, outcome = start(cleaning())
    assert task is not None
    for _ in range(turns):
        await asyncio.sleep(0)
    task.cancel()
    _, error = await outcome.only()
    assert isinstance(error, asyncio.CancelledError)
    assert cleaned == [True]


async def a_future_awaited_by_others_too_is_accepted() -> None:
    future = asyncio.get_running_loop().create_future()

    async def waiting() -> object:
        return await future

    async def late_failure() -> object:
        await asyncio.sleep(0)
        raise KeyError("late")

    other = asyncio.ensure_future(waiting())
    _, outcome = start(waiting())
    _, failed = start(late_failure())
    await asyncio.sleep(0)
    future.set_result(1)
    assert await outcome.only() == (1, None)
    assert await other == 1
    assert isinstance((await failed.only())[1], KeyError)


SCENARIOS: list[Scenario] = [
    inline_result_needs_no_task,
    inline_error_is_delivered,
    inline_cancellation_is_delivered,
    suspended_result_comes_from_a_task,
    a_parked_coroutine_goes_on_when_its_result_is_given,
    a_parked_coroutine_sees_the_error_and_may_park_again,
    a_parked_coroutine_is_cancelled_at_once_and_its_giver_is_told,
    cancelling_what_has_ended_changes_nothing,
    after_parking_a_coroutine_may_still_suspend_on_a_future,
    a_task_may_await_what_is_parked,
    the_first_futures_error_reaches_the_coroutine,
    the_first_futures_error_may_be_the_end,
    cancelling_before_the_task_began_reaches_the_coroutine,
    cancelling_while_it_waits_reaches_the_coroutine,
    a_future_awaited_by_others_too_is_accepted,
]


@pytest.mark.parametrize("loop_factory", [asyncio.new_event_loop, uvloop.new_event_loop], ids=["asyncio", "uvloop"])
@pytest.mark.parametrize("scenario", SCENARIOS, ids=lambda scenario: scenario.__name__)
def test_drive(scenario: Callable[[], Coroutine[Any, Any, None]], loop_factory: Any) -> None:
    with asyncio.Runner(loop_factory=loop_factory) as runner:
        runner.run(scenario())
