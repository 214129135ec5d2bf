"""A coroutine started by hand behaves as it would in a Task."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Coroutine
from typing import Any

import pytest
import uvloop

from models.serving.drive import drive

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


def start(coroutine: Coroutine[Any, Any, object]) -> tuple[asyncio.Task[object] | None, Outcome]:
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
    assert await outcome.only() == (("x", task), None)


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
