"""Jobs are run beside the traffic, each for its owner alone, and whoever waits for one is told."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from models.errors import (
    Conflict,
    DeadlineExceeded,
    EngineFailure,
    Forbidden,
    InvalidRequest,
    NotFound,
    NotReady,
    Overloaded,
    TierlineError,
)
from models.serving.caller import Caller
from models.serving.jobs import desk as module
from models.serving.jobs.desk import Jobs
from models.serving.jobs.feed import job_feed
from models.serving.jobs.job import TRANSITIONS, Answer, Failure, Job, Work
from models.serving.jobs.runner import LOW_PRIORITY, RunnerSettings
from models.serving.jobs.sqlite import SqliteJobs
from models.serving.jobs.webhook import Webhooks
from models.serving.predictor import InferRequest, InferResponse, Predictor
from models.testing import FailingPredictor, SlowPredictor, StaticPredictor

BODY = b'{"id":"mine","inputs":[{"name":"x","datatype":"FP32","shape":[1],"data":[1]}],"parameters":{"priority":1}}'
ME, OTHER = Caller("camera", "acme"), Caller("camera", "other")
Y = {"y": np.ones(1, np.float32)}


class Clock:
    now = 1000.0

    def __call__(self) -> float:
        return self.now


Make = Callable[..., Jobs]


@pytest.fixture
async def make(tmp_path: Path) -> AsyncIterator[Make]:
    """Jobs over a store of its own, stopped when the test ends; `started=False` leaves them standing."""
    stops = []

    async def start(predictor: Predictor, *, started: bool = True, **options: Any) -> Jobs:
        options.setdefault("ready", lambda: True)
        options.setdefault("settings", RunnerSettings(poll=0.01, lease=0.3))
        store = SqliteJobs(tmp_path / f"{len(stops)}.db")
        jobs = Jobs(store, predictor, **options)
        running = jobs.running()
        if started:
            await running.__aenter__()
            stops.append(lambda: running.__aexit__(None, None, None))
        else:
            stops.append(store.close)
        return jobs

    yield start  # type: ignore[misc]
    for stop in stops:
        await stop()


async def ended(jobs: Jobs, job: Job) -> Job:
    told: asyncio.Future[Job] = asyncio.get_running_loop().create_future()
    jobs.subscribe(job.id, told.set_result)
    async with asyncio.timeout(5):
        return await told


async def submit(jobs: Jobs, caller: Caller = ME, body: bytes = BODY, **options: Any) -> Job:
    return await jobs.submit(caller, "m", options.pop("version", None), Work(body), **options)


async def test_a_job_is_run_with_low_priority_as_its_owner_and_its_answer_is_the_infer_answer(make: Any) -> None:
    predictor = StaticPredictor(Y)
    jobs = await make(predictor)
    job = await submit(jobs, version="2")
    assert job.state == "queued"
    done = await ended(jobs, job)
    assert done.state == "succeeded"
    (request,) = predictor.requests
    assert (request.model, request.version, request.priority) == ("m", "2", LOW_PRIORITY)
    assert (request.tenant, request.client, request.id) == ("acme", "camera", "mine")
    assert request.deadline is not None
    answer = await jobs.result(ME, job.id)
    assert isinstance(answer, Answer)
    assert b'"id":"mine"' in answer.body
    assert answer.header_length is None


async def test_nobody_else_can_tell_that_a_job_exists(make: Any) -> None:
    jobs = await make(StaticPredictor(Y))
    job = await submit(jobs)
    await ended(jobs, job)
    for caller in (OTHER, Caller("another", "acme"), Caller(), Caller(admin=True)):
        for ask in (jobs.get, jobs.result, jobs.cancel):
            with pytest.raises(NotFound):
                await ask(caller, job.id)
        assert await jobs.listing(caller, 10) == []
    assert [each.id for each in await jobs.listing(ME, 10)] == [job.id]


@pytest.mark.parametrize("job_id", ["", "x", "0" * 32, "é" * 32, "0" * 100_000])
async def test_an_unknown_job_is_not_found(make: Any, job_id: str) -> None:
    jobs = await make(StaticPredictor(Y), started=False)
    with pytest.raises(NotFound):
        await jobs.get(ME, job_id)


@pytest.mark.parametrize(
    ("error", "status", "text"),
    [
        (InvalidRequest("input 'x' is wrong"), 400, "input 'x' is wrong"),
        (NotFound("model 'm' is not served here"), 404, "model 'm' is not served here"),
        (EngineFailure("broken"), 500, "broken"),
        (DeadlineExceeded("too slow"), 504, "too slow"),
        (NotFound("half \ud800"), 404, "half ?"),
    ],
)
async def test_an_error_is_the_result_with_its_status(make: Any, error: TierlineError, status: int, text: str) -> None:
    jobs = await make(FailingPredictor(error))
    job = await submit(jobs)
    assert (await ended(jobs, job)).state == "failed"
    assert await jobs.result(ME, job.id) == Failure(text, status)


async def test_what_nobody_expected_is_told_without_internals(make: Any, caplog: pytest.LogCaptureFixture) -> None:
    class Broken:
        async def infer(self, request: InferRequest) -> InferResponse:
            raise RuntimeError("secret")

    jobs = await make(Broken())
    job = await submit(jobs)
    await ended(jobs, job)
    assert await jobs.result(ME, job.id) == Failure("internal error", 500)
    assert "secret" in caplog.text


async def test_a_busy_node_is_asked_again_later_and_no_attempt_is_lost(make: Any) -> None:
    class Busy:
        def __init__(self) -> None:
            self.asked = 0

        async def infer(self, request: InferRequest) -> InferResponse:
            self.asked += 1
            if self.asked <= 4:
                raise (Overloaded("full", 0.001), NotReady("loading"))[self.asked % 2]
            return await StaticPredictor(Y).infer(request)

    busy = Busy()
    clock = Clock()
    patient = RunnerSettings(poll=0.01, lease=1e6)  # the clock below runs so fast that a run would lose its lease
    jobs = await make(busy, clock=clock, uniform=lambda low, high: high, settings=patient)
    job = await submit(jobs)
    async with asyncio.timeout(5):
        while (now := await jobs.get(ME, job.id)).state != "succeeded":
            clock.now += 1.0  # as long as it takes; the pauses are those of the clock
            await asyncio.sleep(0.002)
    assert (busy.asked, now.attempts, now.backoffs) == (5, 1, 4)


async def test_pauses_grow_and_are_jittered(make: Any) -> None:
    clock = Clock()
    jobs = await make(FailingPredictor(NotReady("loading")), clock=clock, uniform=lambda low, high: high)
    job = await submit(jobs)
    seen = []
    async with asyncio.timeout(5):
        for count in range(1, 4):
            while (await jobs.get(ME, job.id)).backoffs < count:
                await asyncio.sleep(0.002)
            row = await jobs._store._run(lambda db: db.execute("SELECT due FROM jobs").fetchone())
            seen.append(row[0] - clock.now)
            clock.now = row[0]
    assert seen == pytest.approx([0.3, 0.6, 1.2], rel=1e-6)


async def test_no_job_is_taken_before_the_models_are_loaded(make: Any) -> None:
    ready = False
    predictor = StaticPredictor(Y)
    jobs = await make(predictor, ready=lambda: ready)
    job = await submit(jobs)
    await jobs.tick()
    assert predictor.requests == []
    ready = True
    assert (await ended(jobs, job)).state == "succeeded"


async def test_no_more_run_at_once_than_is_allowed(make: Any) -> None:
    slow = SlowPredictor(StaticPredictor(Y))
    jobs = await make(slow, settings=RunnerSettings(concurrency=2, poll=0.01))
    submitted = [await submit(jobs) for _ in range(4)]
    await slow.asked.wait()
    async with asyncio.timeout(5):
        while len(jobs._runner._runs) < 2:
            await asyncio.sleep(0.002)
    await jobs.tick()
    states = [(await jobs.get(ME, job.id)).state for job in submitted]
    assert states == ["running", "running", "queued", "queued"]
    slow.release.set()
    for job in submitted:
        await ended(jobs, job)


async def test_cancelling_a_running_job_stops_its_run(make: Any) -> None:
    slow = SlowPredictor(StaticPredictor(Y))
    jobs = await make(slow)
    job = await submit(jobs)
    await slow.asked.wait()
    told: list[Job] = []
    jobs.subscribe(job.id, told.append)
    assert (await jobs.cancel(ME, job.id)).state == "cancelled"
    async with asyncio.timeout(5):
        while not slow.cancelled:
            await asyncio.sleep(0.002)
    assert [each.state for each in told] == ["cancelled"]
    assert (await jobs.get(ME, job.id)).state == "cancelled"
    with pytest.raises(Conflict, match="cancelled"):
        await jobs.result(ME, job.id)


async def test_cancelling_a_queued_job_removes_it(make: Any) -> None:
    jobs = await make(StaticPredictor(Y), started=False)
    job = await submit(jobs)
    with pytest.raises(Conflict, match="queued"):
        await jobs.result(ME, job.id)
    await jobs.cancel(ME, job.id)
    with pytest.raises(NotFound):
        await jobs.get(ME, job.id)


async def test_a_run_that_another_node_has_taken_over_is_stopped(make: Any) -> None:
    slow = SlowPredictor(StaticPredictor(Y))
    jobs = await make(slow)
    job = await submit(jobs)
    await slow.asked.wait()
    await jobs._store._run(lambda db: db.execute("UPDATE jobs SET worker = 'another' WHERE id = ?", (job.id,)))
    async with asyncio.timeout(5):
        while not slow.cancelled:
            await asyncio.sleep(0.002)
    assert (await jobs.get(ME, job.id)).state == "running"


async def test_a_node_that_stood_still_for_longer_than_its_lease_does_not_run_its_own_job_twice(make: Any) -> None:
    static = StaticPredictor(Y)
    slow = SlowPredictor(static)
    jobs = await make(slow, settings=RunnerSettings(concurrency=3, poll=0.01))
    job = await submit(jobs)
    await slow.asked.wait()
    await jobs._store._run(lambda db: db.execute("UPDATE jobs SET lease = 0"))
    async with asyncio.timeout(5):
        while (await jobs.get(ME, job.id)).attempts < 2:
            await asyncio.sleep(0.002)
    slow.release.set()
    assert (await ended(jobs, job)).state == "succeeded"
    assert len(static.requests) == 1


async def test_runs_under_way_are_handed_back_when_the_node_stops(tmp_path: Path) -> None:
    slow = SlowPredictor(StaticPredictor(Y))
    first = Jobs(SqliteJobs(tmp_path / "jobs.db"), slow, ready=lambda: True)
    async with first.running():
        job = await submit(first)
        await slow.asked.wait()
    second = Jobs(SqliteJobs(tmp_path / "jobs.db"), StaticPredictor(Y), ready=lambda: True)
    async with second.running():
        done = await ended(second, job)
    assert (done.state, done.attempts) == ("succeeded", 1)


async def test_who_waits_is_told_once_also_of_what_ended_elsewhere_and_may_change_their_mind(make: Any) -> None:
    jobs = await make(StaticPredictor(Y), started=False)
    job = await submit(jobs)
    told: list[Job] = []
    jobs.subscribe(job.id, told.append)
    jobs.subscribe(job.id, lambda job: 1 / 0)  # a careless one disturbs nobody
    jobs.subscribe(job.id, told.append)()
    await jobs.tick()
    assert told == []
    store = jobs._store
    await store.claim("another node", job.created, 15.0)
    await store.finish(job.id, "another node", job.created, Answer(b""), jobs._limits)
    await jobs.tick()
    await jobs.tick()
    assert [each.state for each in told] == ["succeeded"]
    assert (jobs._subscribed, jobs._subscribers) == (0, {})


async def test_those_who_wait_are_bounded(make: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MAX_SUBSCRIBERS", 1)
    jobs = await make(StaticPredictor(Y), started=False)
    stop = jobs.subscribe("a", print)
    with pytest.raises(Overloaded):
        jobs.subscribe("b", print)
    stop()
    stop()
    jobs.subscribe("b", print)


async def test_what_takes_too_long_fails_and_is_gone_after_as_long_again(make: Any) -> None:
    clock = Clock()
    jobs = await make(StaticPredictor(Y), started=False, clock=clock)
    job = await submit(jobs, ttl=10.0)
    clock.now += 11
    await jobs.tick()
    failure = await jobs.result(ME, job.id)
    assert isinstance(failure, Failure)
    assert failure.status == 504
    clock.now += 11
    await jobs.tick()
    with pytest.raises(NotFound):
        await jobs.get(ME, job.id)


@pytest.mark.parametrize("ttl", [0.0, -1.0, 7 * 86_400.0 + 1])
async def test_a_time_to_live_out_of_range_is_refused(make: Any, ttl: float) -> None:
    jobs = await make(StaticPredictor(Y), started=False)
    with pytest.raises(InvalidRequest, match="tierline-job-ttl-s"):
        await submit(jobs, ttl=ttl)


async def test_the_end_is_reported_to_an_allowed_webhook_and_tried_again(make: Any) -> None:
    class Hooks(Webhooks):
        seen: list[Job] = []

        async def deliver(self, job: Job) -> float | None:
            self.seen.append(job)
            return 1001.0 if len(self.seen) == 1 else None

    clock = Clock()
    hooks = Hooks(["https://hooks.example.com"])
    jobs = await make(StaticPredictor(Y), clock=clock, webhooks=hooks)
    job = await submit(jobs, webhook="https://hooks.example.com/x")
    await ended(jobs, job)
    async with asyncio.timeout(5):
        while len(hooks.seen) < 2:
            await jobs.tick()
            await asyncio.sleep(0.002)
            clock.now += 0.1
    for _ in range(3):
        clock.now += 1000
        await jobs.tick()
    assert [(each.state, each.hook_tries) for each in hooks.seen] == [("succeeded", 1), ("succeeded", 2)]
    with pytest.raises(Forbidden):
        await submit(jobs, webhook="https://elsewhere.example.com/x")


def test_the_table_of_states_has_no_way_out_of_an_end_and_reaches_every_state() -> None:
    reached = {state for following in TRANSITIONS.values() for state in following}
    assert reached | {"queued"} == set(TRANSITIONS)


# --- what one owner may take ---------------------------------------------------------------------------------------------


async def test_one_owner_cannot_have_all_calls_to_the_store(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    jobs = await make(StaticPredictor(Y), started=False)
    mine, others = await submit(jobs), await submit(jobs, OTHER)
    gate = asyncio.Event()
    find = jobs._store.find

    async def slow(ids: Sequence[str]) -> list[Job]:
        await gate.wait()
        return await find(ids)

    monkeypatch.setattr(jobs._store, "find", slow)
    waiting = [asyncio.ensure_future(jobs.get(ME, mine.id)) for _ in range(module.MAX_ASKING)]
    await asyncio.sleep(0)
    for call in (lambda: jobs.get(ME, mine.id), lambda: jobs.listing(ME, 1), lambda: submit(jobs)):
        with pytest.raises(Overloaded, match="of your calls wait"):
            await call()
    other = asyncio.ensure_future(jobs.get(OTHER, others.id))
    gate.set()
    assert (await other).id == others.id
    assert {job.id for job in await asyncio.gather(*waiting)} == {mine.id}
    assert (await jobs.get(ME, mine.id)).id == mine.id


async def test_calls_that_were_given_up_take_nobodys_place(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    jobs = await make(StaticPredictor(Y), started=False)
    job = await submit(jobs)

    async def never(ids: Sequence[str]) -> list[Job]:
        await asyncio.Event().wait()
        return []

    with monkeypatch.context() as patch:
        patch.setattr(jobs._store, "find", never)
        waiting = [asyncio.ensure_future(jobs.get(ME, job.id)) for _ in range(module.MAX_ASKING)]
        await asyncio.sleep(0)
        for call in waiting:
            call.cancel()
        await asyncio.wait(waiting)
    assert (await jobs.get(ME, job.id)).id == job.id


async def test_one_owner_has_a_share_of_the_subscriptions(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MAX_SUBSCRIBERS", 8)
    jobs = await make(StaticPredictor(Y), started=False)
    told: list[Job] = []
    job = await submit(jobs)
    taken_back = [jobs.subscribe(job.id, told.append, ME) for _ in range(2)]
    with pytest.raises(Overloaded):
        jobs.subscribe("another", told.append, ME)
    jobs.subscribe(job.id, told.append, OTHER)
    taken_back[0]()
    taken_back[0]()
    jobs.subscribe("another", told.append, ME)
    with pytest.raises(Overloaded):
        jobs.subscribe("another", told.append, ME)
    await jobs.cancel(ME, job.id)
    assert len(told) == 2
    jobs.subscribe("another", told.append, ME)
    for _ in range(6):
        jobs.subscribe("another", told.append)  # all that are left: nobody can be told from another there
    with pytest.raises(Overloaded):
        jobs.subscribe("another", told.append)


async def test_a_feed_asks_whether_its_caller_asks_too_often(make: Make) -> None:
    def admit(caller: Caller) -> None:
        raise Overloaded(f"{caller.client} asks too often")

    jobs = await make(StaticPredictor(Y), started=False, admit=admit)
    told: asyncio.Future[Mapping[str, Any]] = asyncio.get_running_loop().create_future()
    job_feed(jobs)(ME, "0" * 32, told.set_result)
    async with asyncio.timeout(5):
        assert await told == {"status": 429, "error": "camera asks too often"}
