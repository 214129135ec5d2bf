"""Limits refuse exactly what is above them, count it, and let go of everything they hold."""

from __future__ import annotations

import asyncio
from typing import Any

import numpy as np
import pytest

from models.errors import EngineFailure, Overloaded
from models.serving.access.settings import Settings, decode_settings
from models.serving.drive import drive
from models.serving.guard import BUSY_RETRY_SECONDS, MAX_CLIENTS, Guard
from models.serving.predictor import InferRequest
from models.testing import FailingPredictor, SlowPredictor, StaticPredictor

Y = {"y": np.ones(1, np.float32)}


class Source:
    def __init__(self, text: str) -> None:
        self.settings: Settings = decode_settings(text.encode())


class Clock:
    now = 50.0

    def __call__(self) -> float:
        return self.now


def request(client: str | None = "c", tenant: str | None = "t", **given: Any) -> InferRequest:
    return InferRequest(model="m", inputs={}, client=client, tenant=tenant, **given)


def guard_of(text: str, inner: Any = None, clock: Clock | None = None) -> Guard:
    return Guard(inner or StaticPredictor(Y), Source(text), clock or Clock())


async def accepted(guard: Guard, times: int, **who: Any) -> int:
    count = 0
    for _ in range(times):
        try:
            await guard.infer(request(**who))
            count += 1
        except Overloaded:
            pass
    return count


async def test_without_limits_everything_passes_and_is_counted_while_it_lasts() -> None:
    slow = SlowPredictor(StaticPredictor(Y))
    guard = Guard(slow)
    asked = asyncio.ensure_future(guard.infer(request()))
    await slow.asked.wait()
    assert guard.in_flight == 1
    slow.release.set()
    assert (await asked).outputs is Y
    assert (guard.in_flight, guard.rejected_rate, guard.rejected_concurrency) == (0, 0, 0)


async def test_a_client_above_its_rate_is_told_when_to_come_back() -> None:
    clock = Clock()
    guard = guard_of("[tenants.t]\nrate = 4\nburst = 2", clock=clock)
    assert await accepted(guard, 2) == 2
    with pytest.raises(Overloaded, match="4 times a second") as refused:
        await guard.infer(request())
    assert refused.value.retry_after == pytest.approx(0.25)
    assert guard.rejected_rate == 1
    clock.now += refused.value.retry_after + 1e-9
    await guard.infer(request())


async def test_clients_have_a_bucket_each_also_when_two_tenants_use_one_name() -> None:
    guard = guard_of('[tenants."*"]\nrate = 1\nburst = 3\n[clients.big]\nrate = 10\nburst = 5')
    assert await accepted(guard, 9, client="a") == 3
    assert await accepted(guard, 9, client="b") == 3
    assert await accepted(guard, 9, client="a", tenant="u") == 3
    assert await accepted(guard, 9, client="big") == 5
    assert await accepted(guard, 9, client=None, tenant=None) == 3
    assert guard.rejected_rate == 6 * 4 + 4


async def test_buckets_are_bounded_whatever_names_are_signed() -> None:
    guard = guard_of('[tenants."*"]\nrate = 1')
    for number in range(MAX_CLIENTS + 5):
        await guard.infer(request(client=f"c{number}"))
    assert len(guard._allowances) == MAX_CLIENTS


async def test_a_tenant_has_so_many_requests_in_work_and_others_are_not_touched() -> None:
    slow = SlowPredictor(StaticPredictor(Y))
    guard = guard_of("[tenants.t]\nconcurrency = 2\n[tenants.u]", slow)
    asked = [asyncio.ensure_future(guard.infer(request(client=name))) for name in ("a", "b")]
    await asyncio.sleep(0)
    with pytest.raises(Overloaded, match="tenant has 2") as refused:
        await guard.infer(request())
    assert refused.value.retry_after == BUSY_RETRY_SECONDS
    asked.append(asyncio.ensure_future(guard.infer(request(tenant="u"))))
    await asyncio.sleep(0)
    assert guard.in_flight == 3
    slow.release.set()
    await asyncio.gather(*asked)
    await guard.infer(request())
    assert (guard.in_flight, guard.rejected_concurrency, guard._of_tenant) == (0, 1, {})


async def test_the_whole_server_has_so_many_requests_in_work() -> None:
    slow = SlowPredictor(StaticPredictor(Y))
    guard = guard_of("max_in_flight = 1", slow)
    asked = asyncio.ensure_future(guard.infer(request()))
    await asyncio.sleep(0)
    with pytest.raises(Overloaded, match="this server has 1"):
        await guard.infer(request(tenant="other"))
    slow.release.set()
    await asked
    assert (guard.in_flight, guard.rejected_concurrency) == (0, 1)


async def test_a_request_refused_for_concurrency_takes_nothing_from_the_bucket() -> None:
    slow = SlowPredictor(StaticPredictor(Y))
    guard = guard_of("[tenants.t]\nconcurrency = 1\nrate = 1\nburst = 2", slow)
    asked = asyncio.ensure_future(guard.infer(request()))
    await asyncio.sleep(0)
    assert await accepted(guard, 5) == 0
    slow.release.set()
    await asked
    assert await accepted(guard, 5) == 1
    assert (guard.rejected_concurrency, guard.rejected_rate) == (5, 4)


@pytest.mark.parametrize("text", ["", "max_in_flight = 5", "[tenants.t]\nconcurrency = 1\nrate = 100"])
async def test_an_error_and_a_cancelled_request_give_their_place_back(text: str) -> None:
    guard = guard_of(text, FailingPredictor(EngineFailure("no")))
    for _ in range(3):
        with pytest.raises(EngineFailure):
            await guard.infer(request())
    slow = SlowPredictor(StaticPredictor(Y))
    guard = guard_of(text, slow)
    for _ in range(3):
        driven = drive(guard.infer(request()), lambda result, error: None, asyncio.get_running_loop())
        assert driven is not None
        assert guard.in_flight == 1
        driven.cancel()
        for _ in range(3):
            await asyncio.sleep(0)
        assert (guard.in_flight, guard._of_tenant) == (0, {})


async def test_a_request_without_a_deadline_gets_the_configured_one() -> None:
    inner = StaticPredictor(Y)
    guard = guard_of("default_deadline_ms = 250", inner)
    await guard.infer(request())
    await guard.infer(request(deadline=50.1))
    assert [each.deadline for each in inner.requests] == [50.25, 50.1]
    unconfigured = StaticPredictor(Y)
    await guard_of("max_in_flight = 9", unconfigured).infer(request())
    assert unconfigured.requests[0].deadline is None


async def test_new_limits_are_in_force_with_the_next_request_and_counts_stay_true() -> None:
    slow = SlowPredictor(StaticPredictor(Y))
    source = Source("")
    guard = Guard(slow, source, Clock())
    asked = [asyncio.ensure_future(guard.infer(request()))]
    await asyncio.sleep(0)
    source.settings = Source("[tenants.t]\nconcurrency = 1").settings
    asked.append(asyncio.ensure_future(guard.infer(request())))
    await asyncio.sleep(0)
    with pytest.raises(Overloaded):
        await guard.infer(request())
    source.settings = Source("").settings
    slow.release.set()
    await asyncio.gather(*asked)
    await guard.infer(request())
    assert (guard.in_flight, guard._of_tenant) == (0, {})
