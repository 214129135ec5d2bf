from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Callable

import numpy as np
import pytest
from msgspec.structs import replace

from models.errors import DeadlineExceeded, InvalidRequest, NotFound, NotReady, TierlineError, Unreachable
from models.policy import Policy, Reason, Rule
from models.serving.estimates import MISSES_TO_OPEN
from models.serving.policy_book import PolicyBook
from models.serving.predictor import InferRequest, InferResponse
from models.serving.router import MAX_BUDGET_SECONDS, Router

ANSWER = InferResponse(
    outputs={"y": np.zeros(1, np.float32)}, model="m", package="small", version="1", tier="edge", confidence=0.5
)
ABOVE = replace(ANSWER, package="large", tier="cloud", confidence=0.99)


class Here:
    """This tier's models: one, called `m`."""

    def __init__(
        self, confidence: float | None = 0.5, *, models: tuple[str, ...] = ("m",), threshold: float = 0.9
    ) -> None:
        self.answer = replace(ANSWER, confidence=confidence)
        self.models = models
        self.limit = threshold
        self.calls = 0

    def has(self, model: str, version: str | None) -> bool:
        return model in self.models

    def threshold(self, model: str) -> float:
        return self.limit

    async def infer(self, request: InferRequest) -> InferResponse:
        self.calls += 1
        if request.model not in self.models:
            raise NotFound(f"model '{request.model}' is not served here")
        return self.answer


class Up:
    """The tier above: does what it is told."""

    def __init__(self, outcome: InferResponse | Exception | None = ABOVE, *, pings: bool = True) -> None:
        self.outcome = outcome
        self.answers_pings = pings
        self.requests: list[InferRequest] = []
        self.pings = 0

    async def infer(self, request: InferRequest) -> InferResponse:
        self.requests.append(request)
        if self.outcome is None:
            await asyncio.Event().wait()
        if isinstance(self.outcome, Exception):
            raise self.outcome
        assert self.outcome is not None
        return self.outcome

    async def ping(self, timeout: float) -> float:
        self.pings += 1
        if isinstance(self.outcome, Exception):
            raise self.outcome
        if not self.answers_pings:
            raise Unreachable("no answer to a ping")
        return 0.001


def router(here: Here, up: Up | None, *, clock: Callable[[], float] = time.monotonic, **rule: object) -> Router:
    book = PolicyBook("edge", Policy(rules=(Rule(**rule),)))  # type: ignore[arg-type]
    return Router(here, up, models=here, book=book, clock=clock)


def request(deadline_ms: float | None = 1000.0, **fields: object) -> InferRequest:
    deadline = None if deadline_ms is None else time.monotonic() + deadline_ms / 1e3
    return InferRequest(model="m", inputs={}, deadline=deadline, **fields)  # type: ignore[arg-type]


async def test_a_confident_answer_stays_here() -> None:
    up = Up()
    answer = await router(Here(0.95), up).infer(request())
    assert (answer.tier, answer.reason, answer.degraded) == ("edge", Reason.CONFIDENT, False)
    assert not up.requests


async def test_an_unsure_answer_is_replaced_by_the_tier_above() -> None:
    answer = await router(Here(0.5), Up()).infer(request())
    assert (answer.tier, answer.package, answer.reason, answer.degraded) == ("cloud", "large", Reason.ESCALATED, False)


async def test_the_tier_above_gets_less_time_than_the_caller_gave() -> None:
    up = Up()
    asked = request(100.0)
    await router(Here(), up, reserve_ms=8).infer(asked)
    (sent,) = up.requests
    assert asked.deadline is not None
    assert sent.deadline is not None
    assert 0.008 < asked.deadline - sent.deadline < 0.020


async def test_a_request_without_deadline_gets_the_policys() -> None:
    up = Up()
    before = time.monotonic()
    await router(Here(), up, default_deadline_ms=200.0).infer(request(None))
    deadline = up.requests[0].deadline
    assert deadline is not None
    assert before < deadline < before + 0.25


@pytest.mark.parametrize(
    ("outcome", "reason"),
    [
        (None, Reason.UP_LATE),
        (Unreachable("refused"), Reason.UP_UNREACHABLE),
        (NotReady("starting"), Reason.UP_UNREACHABLE),
        (DeadlineExceeded("late"), Reason.UP_LATE),
        (NotFound("no such model there"), Reason.UP_REFUSED),
        (TierlineError("broken there"), Reason.UP_REFUSED),
        (ValueError("a mistake of ours"), Reason.UP_REFUSED),
    ],
)
async def test_whatever_happens_above_the_answer_in_hand_comes_back_in_time(
    outcome: Exception | None, reason: Reason
) -> None:
    asked = request(60.0)
    answer = await router(Here(), Up(outcome)).infer(asked)
    assert asked.deadline is not None
    assert time.monotonic() < asked.deadline
    assert (answer.tier, answer.reason, answer.degraded) == ("edge", reason, True)


async def test_a_degraded_answer_from_above_keeps_its_reason() -> None:
    answer = await router(Here(), Up(replace(ABOVE, degraded=True, reason=Reason.UP_LATE))).infer(request())
    assert (answer.reason, answer.degraded) == (Reason.UP_LATE, True)


async def test_after_misses_in_a_row_the_tier_above_is_left_alone() -> None:
    up = Up(Unreachable("down"))
    routed = router(Here(), up)
    for _ in range(MISSES_TO_OPEN + 3):
        answer = await routed.infer(request())
        assert answer.reason == Reason.UP_UNREACHABLE
    assert len(up.requests) == MISSES_TO_OPEN
    assert routed.up_suspended


async def test_refusals_from_above_do_not_open_the_breaker() -> None:
    up = Up(InvalidRequest("not for me"))
    routed = router(Here(), up)
    for _ in range(MISSES_TO_OPEN + 3):
        await routed.infer(request())
    assert not routed.up_suspended


async def test_callers_in_a_hurry_do_not_cost_the_patient_ones_a_healthy_tier() -> None:
    up = Up(None)
    routed = router(Here(), up, reserve_ms=0)
    async with routed.probing():
        for _ in range(3 * MISSES_TO_OPEN):
            await routed.infer(request(12.0))
        up.outcome = ABOVE
        assert not routed.up_suspended
        assert (await routed.infer(request())).tier == "cloud"


async def test_a_tier_that_answers_neither_requests_nor_pings_is_left_alone() -> None:
    up = Up(None, pings=False)
    routed = router(Here(), up, reserve_ms=0)
    async with routed.probing():
        for _ in range(MISSES_TO_OPEN):
            assert (await routed.infer(request(15.0))).reason == Reason.UP_LATE
        async with asyncio.timeout(5):
            while not routed.up_suspended:
                await asyncio.sleep(0.01)
    asked = len(up.requests)
    assert (await routed.infer(request())).reason == Reason.UP_UNREACHABLE
    assert len(up.requests) == asked


@pytest.mark.parametrize("seconds", [float("inf"), 1e300])
async def test_a_deadline_without_end_is_bounded(seconds: float) -> None:
    up = Up()
    answer = await router(Here(), up).infer(replace(request(), deadline=seconds))
    assert answer.tier == "cloud"
    assert up.requests[0].deadline is not None
    assert up.requests[0].deadline < time.monotonic() + MAX_BUDGET_SECONDS


async def test_a_probe_closes_the_breaker_without_user_traffic() -> None:
    up = Up(Unreachable("down"))
    routed = router(Here(), up)
    for _ in range(MISSES_TO_OPEN):
        await routed.infer(request())
    up.outcome = ABOVE
    async with routed.probing():
        async with asyncio.timeout(5):
            while routed.up_suspended:
                await asyncio.sleep(0.01)
    assert up.pings == 1
    assert (await routed.infer(request())).tier == "cloud"


async def test_a_model_that_is_not_here_is_asked_for_above() -> None:
    answer = await router(Here(models=()), Up()).infer(request())
    assert (answer.tier, answer.reason) == ("cloud", Reason.UPWARD)


async def test_a_model_that_is_nowhere_is_a_clear_refusal() -> None:
    with pytest.raises(NotFound, match="model 'm' is not served here"):
        await router(Here(models=()), None).infer(request())
    with pytest.raises(Unreachable, match="down"):
        await router(Here(models=()), Up(Unreachable("down"))).infer(request())


async def test_a_hanging_tier_above_is_a_refusal_by_the_deadline_when_the_model_is_not_here() -> None:
    with pytest.raises(DeadlineExceeded):
        await router(Here(models=()), Up(None)).infer(request(50.0))


async def test_prefer_up_falls_back_to_this_tier() -> None:
    here = Here(0.99)
    answer = await router(here, Up(Unreachable("down")), prefer="up").infer(request())
    assert (answer.tier, answer.reason, answer.degraded, here.calls) == ("edge", Reason.UP_UNREACHABLE, True, 1)


@pytest.mark.parametrize(
    ("asked", "rule", "tier"),
    [
        ({}, {}, "edge"),
        ({}, {"min_confidence": 0.8}, "cloud"),
        ({"min_confidence": 0.6}, {"min_confidence": 0.8}, "edge"),
    ],
)
async def test_the_callers_threshold_beats_the_policys_which_beats_the_packages(
    asked: dict[str, float], rule: dict[str, float], tier: str
) -> None:
    answer = await router(Here(0.7, threshold=0.65), Up(), **rule).infer(request(**asked))
    assert answer.tier == tier


async def test_errors_of_this_tier_reach_the_caller() -> None:
    class Broken(Here):
        async def infer(self, request: InferRequest) -> InferResponse:
            raise InvalidRequest("input 'image': wrong")

    with pytest.raises(InvalidRequest, match="image"):
        await router(Broken(), Up()).infer(request())


async def test_a_swapped_policy_applies_to_the_next_request() -> None:
    here, up = Here(0.7, threshold=0.65), Up()
    book = PolicyBook("edge")
    routed = Router(here, up, models=here, book=book)
    assert (await routed.infer(request())).tier == "edge"
    body = json.dumps({"rules": [{"min_confidence": 0.99}]}).encode()
    assert book.plan(body, {}) == ()
    await book.commit(await book.prepare(body, {}))
    assert (await routed.infer(request())).tier == "cloud"
