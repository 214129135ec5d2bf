from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Mapping
from typing import Any

import numpy as np
import pytest
from session_fake import FakeSession, loaded

from models.errors import DeadlineExceeded, EngineFailure, InvalidRequest, NotFound, NotReady, Overloaded
from models.manifest import Confidence
from models.serving.batching import Batching
from models.serving.loaded import Identity, Loaded
from models.serving.local import Local
from models.serving.predictor import InferRequest
from models.serving.repository import Repository
from models.tensor import TensorSpec

ROW = np.ones((1, 2), np.float32)


@pytest.fixture
async def repository() -> AsyncIterator[Repository]:
    made = Repository(engines=())
    yield made
    await made.close()


@pytest.fixture
async def local(repository: Repository) -> AsyncIterator[Local]:
    made = Local(repository, "edge", threads=1, max_waiting=2)
    yield made
    await made.close()


def request(**changes: Any) -> InferRequest:
    return InferRequest(**{"model": "m", "inputs": {"x": ROW}, **changes})


def at_once(local: Local, asked: InferRequest) -> Any:
    """Step the coroutine once, with no task and no loop involved: it must finish there."""
    try:
        local.infer(asked).send(None)
    except StopIteration as stop:
        return stop.value
    raise AssertionError("suspended")


# --- in the loop ---------------------------------------------------------------------------------------------------


async def test_a_short_run_answers_without_a_suspension(repository: Repository, local: Local) -> None:
    repository.install({"m": {"1": loaded(FakeSession(3.0), inline=True)}})
    answer = at_once(local, request(id="7"))
    assert answer.outputs["y"].tolist() == [[3.0, 3.0]]
    assert (answer.model, answer.package, answer.version, answer.tier) == ("m", "fake", "1", "edge")
    assert (answer.reason, answer.degraded, answer.confidence, answer.id) == ("local", False, None, "7")
    assert set(answer.timings) == {"queue", "compute"}


async def test_a_large_request_for_a_fast_model_leaves_the_loop(repository: Repository, local: Local) -> None:
    session = FakeSession()
    made = loaded(session, inline=True)
    made.inline_elements = 4
    repository.install({"m": {"1": made}})
    for rows in (2, 3):
        await local.infer(request(inputs={"x": np.ones((rows, 2), np.float32)}))
    # A run that a busy machine drew out is tried again in a thread of asyncio's.
    threads = [name for name in session.threads if not name.startswith("asyncio")]
    assert threads[0] == "MainThread"
    assert threads[1].startswith("tierline-engine")


# --- checks --------------------------------------------------------------------------------------------------------

A, B = TensorSpec("a", "FP32", (-1, 2)), TensorSpec("b", "INT64", (-1,))
GOOD: Mapping[str, Any] = {"a": ROW, "b": np.ones(1, np.int64)}


@pytest.mark.parametrize(
    ("inputs", "reason"),
    [
        ({}, "input 'a', 'b' is missing"),
        ({"a": ROW}, "input 'b' is missing"),
        ({**GOOD, "c": ROW}, "input 'c' is unknown; this model takes a, b"),
        ({"a": ROW, "c": ROW}, "input 'c' is unknown"),
        ({**GOOD, "a": ROW.astype(np.float64)}, "input 'a': expected datatype FP32, got FP64"),
        ({**GOOD, "b": np.ones(1, np.int32)}, "input 'b': expected datatype INT64, got INT32"),
        ({**GOOD, "a": np.ones((1, 3), np.float32)}, r"input 'a': expected shape \[-1, 2\], got \[1, 3\]"),
        ({**GOOD, "a": np.ones(2, np.float32)}, r"input 'a': expected shape \[-1, 2\], got \[2\]"),
        ({**GOOD, "a": np.ones((1, 1, 2), np.float32)}, "input 'a': expected shape"),
        ({**GOOD, "b": np.array(1, np.int64)}, r"input 'b': expected shape \[-1\], got \[\]"),
        ({**GOOD, "b": np.ones(3, np.int64)}, "input 'b': has 3 rows, another input has 1"),
    ],
)
async def test_bad_input_is_refused_naming_it_and_never_reaches_the_engine(
    repository: Repository, local: Local, inputs: dict[str, Any], reason: str
) -> None:
    session = FakeSession(inputs=(A, B))
    made = loaded(session, inline=True)
    made.batching = Batching(8, "")
    repository.install({"m": {"1": made}})
    with pytest.raises(InvalidRequest, match=reason):
        await local.infer(request(inputs=inputs))
    assert session.asked == []
    await local.infer(request(inputs=GOOD))


async def test_an_empty_tensor_is_for_the_engine_to_judge(repository: Repository, local: Local) -> None:
    repository.install({"m": {"1": loaded(FakeSession(), inline=True)}})
    answer = await local.infer(request(inputs={"x": np.ones((0, 2), np.float32)}))
    assert answer.outputs["y"].shape == (0, 2)


async def test_inputs_may_differ_in_size_where_rows_are_not_run_together(repository: Repository, local: Local) -> None:
    repository.install({"m": {"1": loaded(FakeSession(inputs=(A, B)), inline=True)}})
    answer = await local.infer(request(inputs={"a": ROW, "b": np.ones(3, np.int64)}))
    assert answer.version == "1"


async def test_fixed_sizes_are_checked(repository: Repository, local: Local) -> None:
    session = FakeSession(inputs=(TensorSpec("x", "FP32", (1, 2)),))
    repository.install({"m": {"1": loaded(session, inline=True)}})
    await local.infer(request())
    with pytest.raises(InvalidRequest, match=r"expected shape \[1, 2\], got \[2, 2\]"):
        await local.infer(request(inputs={"x": np.ones((2, 2), np.float32)}))


async def test_an_unknown_output_model_or_version_is_named(repository: Repository, local: Local) -> None:
    repository.install({"m": {"1": loaded(FakeSession(), inline=True)}})
    with pytest.raises(InvalidRequest, match="output 'z' is unknown; this model has y"):
        await local.infer(request(outputs=("y", "z")))
    with pytest.raises(NotFound, match="model 'q'"):
        await local.infer(request(model="q"))
    with pytest.raises(NotFound, match="version '2'"):
        await local.infer(request(version="2"))


# --- outputs and confidence ----------------------------------------------------------------------------------------

SCORES = TensorSpec("scores", "FP32", (-1, 2))
EXTRA = TensorSpec("extra", "FP32", (-1, 2))


@pytest.mark.parametrize("asked", [(), ("extra",), ("scores",), ("extra", "scores"), ("extra", "extra")])
async def test_confidence_is_known_whatever_outputs_are_asked_for(
    repository: Repository, local: Local, asked: tuple[str, ...]
) -> None:
    session = FakeSession(0.75, outputs=(SCORES, EXTRA))
    repository.install({"m": {"1": loaded(session, inline=True, confidence=Confidence("scores"))}})
    answer = await local.infer(request(outputs=asked))
    assert answer.confidence == 0.75
    assert set(answer.outputs) == set(asked or ("scores", "extra"))


# --- in the pool ---------------------------------------------------------------------------------------------------


async def test_a_slow_model_does_not_stall_a_fast_one(repository: Repository, local: Local) -> None:
    slow = FakeSession()
    slow.gate.clear()
    repository.install({"slow": {"1": loaded(slow)}, "m": {"1": loaded(FakeSession(), inline=True)}})
    waiting = asyncio.create_task(local.infer(request(model="slow")))
    await asyncio.to_thread(slow.started.acquire, timeout=5)
    assert at_once(local, request()).version == "1"
    slow.gate.set()
    assert (await waiting).outputs["y"].tolist() == [[1.0, 1.0]]


async def test_a_deadline_that_has_passed_is_said_before_any_work(repository: Repository, local: Local) -> None:
    session = FakeSession()
    repository.install({"m": {"1": loaded(session, inline=True)}})
    with pytest.raises(DeadlineExceeded, match="had passed"):
        await local.infer(request(deadline=time.monotonic() - 1))
    assert session.asked == []


async def test_the_wait_ends_at_the_deadline_and_the_session_stays_open_until_the_run_is_over(
    repository: Repository, local: Local
) -> None:
    session = FakeSession()
    session.gate.clear()
    repository.install({"m": {"1": loaded(session)}})
    with pytest.raises(DeadlineExceeded, match="did not answer within"):
        await local.infer(request(deadline=time.monotonic() + 0.02))
    repository.install({})
    assert not session.closed.is_set()
    session.gate.set()
    assert await asyncio.to_thread(session.closed.wait, 5)
    assert not session.closed_while_running


async def test_a_queued_run_whose_caller_has_gone_is_never_run(repository: Repository, local: Local) -> None:
    session = FakeSession()
    session.gate.clear()
    repository.install({"m": {"1": loaded(session)}})
    first = asyncio.create_task(local.infer(request()))
    await asyncio.to_thread(session.started.acquire, timeout=5)
    second = asyncio.create_task(local.infer(request()))
    await asyncio.sleep(0)
    second.cancel()
    with pytest.raises(asyncio.CancelledError):
        await second
    session.gate.set()
    await first
    await local.close()
    assert len(session.asked) == 1


async def test_what_cannot_wait_is_refused_at_once_and_room_comes_back(repository: Repository, local: Local) -> None:
    session = FakeSession()
    session.gate.clear()
    repository.install({"m": {"1": loaded(session)}})
    waiting = [asyncio.create_task(local.infer(request()))]
    await asyncio.to_thread(session.started.acquire, timeout=5)
    waiting += [asyncio.create_task(local.infer(request())) for _ in range(2)]
    await asyncio.sleep(0)
    with pytest.raises(Overloaded, match="2 requests are waiting") as refused:
        await local.infer(request())
    assert 0 < refused.value.retry_after <= 2
    session.gate.set()
    await asyncio.gather(*waiting)
    assert (await local.infer(request())).version == "1"


@pytest.mark.parametrize("inline", [True, False])
async def test_an_engine_failure_reaches_the_caller_and_the_next_request_is_answered(
    repository: Repository, local: Local, inline: bool
) -> None:
    session = FakeSession()
    made = loaded(session, inline=inline)
    repository.install({"m": {"1": made}})
    session.error = EngineFailure("broken")
    with pytest.raises(EngineFailure, match="broken"):
        await local.infer(request())
    assert (made.failures, made.in_flight) == (1, 0)
    session.error = None
    assert (await local.infer(request())).version == "1"


async def test_a_stopped_tier_says_so(repository: Repository, local: Local) -> None:
    repository.install({"m": {"1": loaded(FakeSession())}})
    await local.close()
    with pytest.raises(NotReady, match="stopping"):
        await local.infer(request())


async def test_runs_that_wait_for_a_thread_are_refused_when_the_tier_stops(
    repository: Repository, local: Local
) -> None:
    session = FakeSession()
    session.gate.clear()
    repository.install({"m": {"1": loaded(session)}})
    first, second = (asyncio.create_task(local.infer(request())) for _ in range(2))
    await asyncio.to_thread(session.started.acquire, timeout=5)
    closing = asyncio.create_task(local.close())
    with pytest.raises(NotReady, match="stopping"):
        await asyncio.wait_for(second, 5)
    session.gate.set()
    await closing
    assert (await first).version == "1"
    assert len(session.asked) == 1


# --- whose fault ---------------------------------------------------------------------------------------------------


class Picky(FakeSession):
    """Refuses negative inputs, as a table's lookup does an index it does not have."""

    def run(self, inputs: Mapping[str, Any], outputs: Any) -> list[Any]:
        if inputs["x"].min() < 0:
            raise EngineFailure("engine: index -1 is out of bounds")
        return super().run(inputs, outputs)


@pytest.mark.parametrize("inline", [True, False])
async def test_inputs_that_the_engine_refuses_are_the_callers_fault_and_do_not_count(
    repository: Repository, local: Local, inline: bool
) -> None:
    session = Picky()
    made = Loaded(Identity("fake", "1", "fake"), session, sample={"x": ROW})
    made.inline_elements = 100 if inline else 0
    repository.install({"m": {"1": made}})
    for _ in range(10):
        with pytest.raises(InvalidRequest, match="the model refuses these inputs: engine: index -1"):
            await local.infer(request(inputs={"x": -ROW}))
    assert (made.answers, made.failures, made.in_flight) == (0, 0, 0)
    assert repository.verdict() == "undecided"
    assert (await local.infer(request())).version == "1"


async def test_an_unmeasured_model_is_judged_by_the_first_inputs_it_answered(
    repository: Repository, local: Local
) -> None:
    made = loaded(Picky())
    repository.install({"m": {"1": made}})
    for _ in range(2):
        with pytest.raises(EngineFailure):
            await local.infer(request(inputs={"x": -ROW}))
    await local.infer(request())
    with pytest.raises(InvalidRequest, match="refuses these inputs"):
        await local.infer(request(inputs={"x": -ROW}))
    assert (made.answers, made.failures) == (3, 2)


@pytest.mark.parametrize("inline", [True, False])
async def test_callers_who_send_nan_do_not_make_a_version_bad(
    repository: Repository, local: Local, inline: bool
) -> None:
    session = FakeSession(np.nan)
    repository.install({"m": {"1": loaded(session, inline=inline)}})
    for _ in range(10):
        await local.infer(request(inputs={"x": ROW * np.nan}))
    assert repository.verdict() == "undecided"
    for _ in range(5):
        await local.infer(request())
    assert repository.verdict().startswith("bad")


# --- cost in the values --------------------------------------------------------------------------------------------


class Spinning(FakeSession):
    """Takes as many seconds of processor time as the first element of its input says."""

    def run(self, inputs: Mapping[str, Any], outputs: Any) -> list[Any]:
        end = time.thread_time() + float(inputs["x"].flat[0])
        while time.thread_time() < end:
            pass
        return super().run(inputs, outputs)


@pytest.mark.parametrize("seconds", [0.003, 0.03])
async def test_a_model_whose_cost_is_in_the_values_leaves_the_loop_for_good(
    repository: Repository, local: Local, seconds: float
) -> None:
    session = Spinning()
    made = loaded(session, inline=True)
    repository.install({"m": {"1": made}})
    await local.infer(request(inputs={"x": ROW * np.float32(seconds)}))
    assert await asyncio.to_thread(session.started.acquire, timeout=5)
    await local.close()
    assert not made.inline
    assert (made.answers, made.in_flight) == (1, 0)


async def test_nothing_enters_the_loop_after_a_long_stall_until_it_is_understood(
    repository: Repository, local: Local
) -> None:
    session = Spinning()
    made = loaded(session, inline=True)
    repository.install({"m": {"1": made}})
    at_once(local, request(inputs={"x": ROW * np.float32(0.03)}))
    assert not made.inline
    await local.infer(request(inputs={"x": ROW * 0}))
    assert session.threads[-1] != "MainThread"


@pytest.mark.parametrize("stall", [0.002, 5.0])
async def test_a_busy_machine_does_not_drive_a_fast_model_out_of_the_loop(repository: Repository, stall: float) -> None:
    made = loaded(FakeSession(), inline=True)
    repository.install({"m": {"1": made}})
    times = iter([0.0, 0.0, stall])
    local = Local(repository, "edge", clock=lambda: next(times))
    await local.infer(request())
    await local.close()
    assert made.inline_elements == 1 << 20


async def test_a_run_in_the_loop_that_ends_after_the_deadline_is_no_answer(repository: Repository) -> None:
    made = loaded(FakeSession(), inline=True)
    repository.install({"m": {"1": made}})
    times = iter([0.0, 0.0, 0.2])
    local = Local(repository, "edge", clock=lambda: next(times))
    with pytest.raises(DeadlineExceeded, match=r"'m' took 200\.0 ms, longer than was left"):
        await local.infer(request(deadline=0.1))
    await local.close()
    assert made.answers == 1
