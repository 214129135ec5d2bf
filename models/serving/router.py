"""Answers here or asks the tier above, by the policy, within the deadline. Does the I/O that `models.policy` decides.

The answer made here stays in hand while the tier above is asked for a better one: asking can improve an answer, never cost it.
Whatever happens above (down, slow, refusing), the caller gets the answer in hand, marked `degraded`, before its deadline.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from math import inf
from typing import Protocol

from msgspec.structs import replace

from models.errors import CallerError, DeadlineExceeded, NotReady, TierlineError, TryAgain, Unreachable
from models.policy import Arm, Decision, Features, Reason, Rule, choose, escalate
from models.serving.estimates import Breaker, Estimate
from models.serving.policy_book import PolicyBook
from models.serving.predictor import InferRequest, InferResponse, Predictor

log = logging.getLogger("tierline.router")

PING_TIMEOUT_SECONDS = 1.0
SUSPECT_PING_SECONDS = 0.5
"""Longest wait for a ping while callers are already not answered in time: they pay for it."""
MAX_BUDGET_SECONDS = 600.0
"""Longest deadline that is honoured; the same bound as a policy's."""
HOP_SHARE = 0.1
"""Share of the remaining time that a hop keeps back from the tier above, beside the rule's reserve, so that clocks that
tick late on a busy machine still leave an answer in time."""
_SUSPENDED = "the tier above does not answer (%s): calls to it are suspended until a probe does"
MAX_ESTIMATES = 1_024
"""Models whose times above are remembered; a caller that invents names must not grow this without end."""


class Upstream(Predictor, Protocol):
    """The tier above: a predictor that can also be pinged."""

    async def ping(self, timeout: float) -> float:
        """Round trip in seconds. Raises Unreachable, or NotReady when it answers but is not ready."""
        ...


class LocalModels(Protocol):
    """What the router asks about the models served here: the repository meets it."""

    def has(self, model: str, version: str | None) -> bool: ...
    def threshold(self, model: str) -> float: ...


class Router:
    """`Predictor` of a tier that has another above it (`up`), or has none (`up=None`)."""

    def __init__(
        self,
        here: Predictor,
        up: Upstream | None,
        *,
        models: LocalModels,
        book: PolicyBook,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._here = here
        self._up = up
        self._models = models
        self._book = book
        self._clock = clock
        self._breaker = Breaker()
        self._times: dict[str, Estimate] = {}
        self._probe_due = asyncio.Event()

    @property
    def up_suspended(self) -> bool:
        """Whether the breaker to the tier above is open."""
        return self._breaker.is_open

    async def infer(self, request: InferRequest) -> InferResponse:
        """Answer by the deadline or raise: DeadlineExceeded, NotFound, or what the predictors raise."""
        now = self._clock()
        has_here = self._models.has(request.model, request.version)
        rule = self._book.rule(request.model, has_here)
        if request.deadline is None:
            request = replace(request, deadline=now + rule.default_deadline_ms / 1e3)
        elif not request.deadline - now <= MAX_BUDGET_SECONDS:
            request = replace(request, deadline=now + MAX_BUDGET_SECONDS)
        decision = choose(rule, self._features(request, now, has_here))
        if decision.arm is Arm.UP:
            return await self._up_first(request, rule, has_here)
        answer = await self._here.infer(request)
        if decision.degraded or decision.reason is Reason.LOCAL:
            return replace(answer, reason=decision.reason, degraded=decision.degraded)
        return await self._better(request, rule, answer)

    async def _better(self, request: InferRequest, rule: Rule, answer: InferResponse) -> InferResponse:
        """The answer in hand, or the tier above's when confidence asks for it and time allows it."""
        now = self._clock()
        threshold = request.min_confidence
        if threshold is None:
            threshold = rule.min_confidence
        if threshold is None:
            threshold = self._models.threshold(request.model)
        decision = escalate(rule, self._features(request, now, True), answer.confidence, threshold)
        if decision.arm is Arm.HERE:
            return replace(answer, reason=decision.reason, degraded=decision.degraded)
        outcome = await self._ask_up(request, rule, decision)
        if isinstance(outcome, InferResponse):
            return outcome
        return replace(answer, reason=outcome.reason, degraded=True)

    async def _up_first(self, request: InferRequest, rule: Rule, has_here: bool) -> InferResponse:
        """Ask above first; fall back to this tier when it has the model, else say why there is no answer."""
        if self._up is None:
            return await self._here.infer(request)  # it says exactly what is missing: the model, or this version of it
        outcome = await self._ask_up(request, rule, Decision(Arm.UP, Reason.UPWARD), keep_time=has_here)
        if isinstance(outcome, InferResponse):
            return outcome
        if has_here:
            answer = await self._here.infer(request)
            return replace(answer, reason=outcome.reason, degraded=True)
        raise outcome.error

    async def _ask_up(
        self, request: InferRequest, rule: Rule, decision: Decision, *, keep_time: bool = True
    ) -> InferResponse | _Missed:
        """One call to the tier above, bounded so that the caller can still be answered from here."""
        assert self._up is not None and request.deadline is not None
        start = self._clock()
        reserve = rule.reserve_ms / 1e3 + HOP_SHARE * max(request.deadline - start, 0.0) if keep_time else 0.0
        deadline = request.deadline - reserve
        if deadline <= start:
            return _Missed(Reason.NO_TIME, DeadlineExceeded("no time left to ask the tier above"))
        if self._breaker.is_open:
            return _Missed(Reason.UP_UNREACHABLE, NotReady("the tier above does not answer; calls to it are suspended"))
        call = asyncio.ensure_future(self._up.infer(replace(request, deadline=deadline)))
        try:
            await asyncio.wait((call,), timeout=deadline - start)
        finally:
            if not call.done():
                call.cancel()
        return self._outcome(request, decision, call, start)

    def _outcome(
        self, request: InferRequest, decision: Decision, call: asyncio.Future[InferResponse], start: float
    ) -> InferResponse | _Missed:
        now = self._clock()
        if not call.done() or call.cancelled():
            return self._late(
                request.model, now - start, now, DeadlineExceeded("the tier above did not answer in time")
            )
        error = call.exception()
        if error is None:
            self._answered(request.model, now - start, now)
            answer = call.result()
            return answer if answer.degraded else replace(answer, reason=decision.reason)
        if isinstance(error, DeadlineExceeded):
            return self._late(request.model, now - start, now, error)
        if isinstance(error, TryAgain):
            if self._breaker.miss(now):
                log.warning(_SUSPENDED, error)
            return _Missed(Reason.UP_UNREACHABLE, error)
        if isinstance(error, CallerError):
            # It answered, and quickly: the link is fine, the request is not for it.
            self._answered(request.model, now - start, now)
        if not isinstance(error, TierlineError):
            # A mistake of ours must not cost the answer in hand either.
            log.error("asking the tier above failed unexpectedly", exc_info=error)
            error = Unreachable("asking the tier above failed unexpectedly")
        return _Missed(Reason.UP_REFUSED, error)

    def _late(self, model: str, waited: float, now: float, error: TierlineError) -> _Missed:
        self._estimate(model).add_late(waited, now)
        if self._breaker.late(now):
            self._probe_due.set()
        return _Missed(Reason.UP_LATE, error)

    def _features(self, request: InferRequest, now: float, has_here: bool) -> Features:
        budget = inf if request.deadline is None else request.deadline - now
        if self._up is None:
            return Features(budget=budget, has_here=has_here, has_up=False)
        estimate = self._times.get(request.model)
        mean, dev = estimate.get(now) if estimate else (Features().up_mean, Features().up_dev)
        return Features(budget=budget, has_here=has_here, breaker_open=self._breaker.is_open, up_mean=mean, up_dev=dev)

    def _estimate(self, model: str) -> Estimate:
        estimate = self._times.get(model)
        if estimate is None:
            prior = Features()
            estimate = Estimate(prior.up_mean, prior.up_dev)
            if len(self._times) < MAX_ESTIMATES:
                self._times[model] = estimate
        return estimate

    def _answered(self, model: str, seconds: float, now: float) -> None:
        self._estimate(model).add(seconds, now)
        if self._breaker.succeed(now):
            log.info("the tier above answers again")

    @asynccontextmanager
    async def probing(self) -> AsyncIterator[None]:
        """Ping the tier above in the background: every second while idle, twice a second while the breaker is open."""
        task = asyncio.create_task(self._probe_forever()) if self._up is not None else None
        try:
            yield
        finally:
            if task is not None:
                task.cancel()
                await asyncio.wait((task,), timeout=PING_TIMEOUT_SECONDS)

    async def _probe_forever(self) -> None:
        while True:
            try:
                async with asyncio.timeout(max(self._breaker.seconds_to_probe(self._clock()), 0.02)):
                    await self._probe_due.wait()
            except TimeoutError:
                pass
            self._probe_due.clear()
            if self._breaker.seconds_to_probe(self._clock()) == 0.0:
                await self._probe()

    async def _probe(self) -> None:
        assert self._up is not None
        timeout = SUSPECT_PING_SECONDS if self._breaker.is_suspect else PING_TIMEOUT_SECONDS
        try:
            await self._up.ping(timeout)
        except TierlineError as error:
            if self._breaker.probe_missed(self._clock()):
                log.warning(_SUSPENDED, error)
        except Exception:
            log.exception("a ping of the tier above failed unexpectedly")
            self._breaker.probe_missed(self._clock())
        else:
            if self._breaker.succeed(self._clock()):
                log.info("the tier above answers again")


class _Missed:
    """Why the tier above gave nothing usable, as a reason for the answer in hand and as an error when there is none."""

    __slots__ = ("error", "reason")

    def __init__(self, reason: Reason, error: TierlineError) -> None:
        self.reason = reason
        self.error = error
