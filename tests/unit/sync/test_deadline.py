"""A wait with an end loses nothing: what work returned to nobody is handed over."""

from __future__ import annotations

import asyncio

import pytest

from sync.deadline import within
from sync.errors import Unavailable
from sync.testing import FakeClock


async def test_work_that_ends_in_the_moment_its_caller_is_cancelled_is_handed_over() -> None:
    late: list[str] = []
    gate = asyncio.Event()

    async def work() -> str:
        await gate.wait()
        return "loaded"

    waiting = asyncio.ensure_future(within(FakeClock(), 10, "loading", work(), late=late.append))
    for _ in range(2):
        await asyncio.sleep(0)
    gate.set()
    for _ in range(2):
        await asyncio.sleep(0)
    waiting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await waiting
    assert late == ["loaded"]


async def test_work_that_takes_too_long_is_cancelled_and_what_it_returns_nevertheless_is_handed_over() -> None:
    clock, late = FakeClock(), []

    async def work() -> str:
        try:
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            return "loaded"

    waiting = asyncio.ensure_future(within(clock, 10, "loading", work(), late=late.append))
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    clock.advance(11)
    with pytest.raises(Unavailable, match="loading was not over within 10 s"):
        await waiting
    assert late == ["loaded"]


async def test_the_result_and_the_error_of_work_are_the_callers() -> None:
    async def good() -> int:
        return 7

    async def bad() -> int:
        raise ValueError("no")

    assert await within(FakeClock(), 1, "work", good()) == 7
    with pytest.raises(ValueError, match="no"):
        await within(FakeClock(), 1, "work", bad())
