"""What comes in one turn of the loop is run together, and every caller gets its own rows."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Mapping, Sequence
from typing import Any

import numpy as np
import pytest
from session_fake import FakeSession, loaded

from models.errors import DeadlineExceeded, EngineFailure, InvalidRequest, NotReady
from models.serving.batching import Batching
from models.serving.drive import drive
from models.serving.loaded import Loaded
from models.serving.local import Local
from models.serving.predictor import InferRequest, InferResponse
from models.serving.repository import Repository
from models.serving.turn import LONELY_TURNS
from models.tensor import TensorSpec


class Recording(FakeSession):
    """y = x * value. Keeps how many rows each run had; refuses negative numbers."""

    def __init__(self, value: float = 2.0) -> None:
        super().__init__(value)
        self.runs: list[int] = []

    def run(self, inputs: Mapping[str, Any], outputs: Sequence[str]) -> list[Any]:
        x = inputs["x"]
        self.runs.append(len(x))
        if self.error is not None:
            raise self.error
        if x.min() < 0:
            raise EngineFailure("negative")
        return [x * self.value]


def batched(session: Recording, rows: int = 32, **changes: Any) -> Loaded:
    made = loaded(session, inline=True, **changes)
    made.batching = Batching(rows, "")
    made.row_elements = 2
    made._sample = {"x": np.ones((1, 2), np.float32)}
    return made


@pytest.fixture(autouse=True)
def calm(monkeypatch: pytest.MonkeyPatch) -> None:
    """A busy machine may draw out any run: only the test that means to looks into it."""
    monkeypatch.setattr("models.serving.local.STALL_SECONDS", 10.0)


@pytest.fixture
async def repository() -> AsyncIterator[Repository]:
    made = Repository(engines=())
    yield made
    await made.close()


@pytest.fixture
async def local(repository: Repository) -> AsyncIterator[Local]:
    made = Local(repository, "edge", threads=1)
    yield made
    await made.close()


def ask(local: Local, number: float, rows: int = 1, **changes: Any) -> asyncio.Future[InferResponse]:
    """Ask as a frontend does, in this very turn of the loop."""
    loop = asyncio.get_running_loop()
    answer: asyncio.Future[InferResponse] = loop.create_future()

    def done(result: InferResponse | None, error: BaseException | None) -> None:
        if result is not None:
            answer.set_result(result)
        else:
            answer.set_exception(error or AssertionError("nothing"))

    x = np.full((rows, 2), number, np.float32)
    drive(local.infer(InferRequest(**{"model": "m", "inputs": {"x": x}, **changes})), done, loop)
    return answer


async def test_requests_of_one_turn_are_one_run_and_everyone_gets_their_own_rows(
    repository: Repository, local: Local
) -> None:
    session = Recording()
    repository.install({"m": {"1": batched(session)}})
    answers = await asyncio.gather(*(ask(local, number, rows=1 + number % 3) for number in range(9)))
    assert session.runs == [18]
    for number, answer in enumerate(answers):
        y = answer.outputs["y"]
        assert y.shape == (1 + number % 3, 2)
        assert (y == 2.0 * number).all()
        assert answer.batch == 18


async def test_a_batch_has_no_more_rows_than_were_measured_to_pay(repository: Repository, local: Local) -> None:
    session = Recording()
    repository.install({"m": {"1": batched(session, rows=4)}})
    await asyncio.gather(*(ask(local, 1.0) for _ in range(10)))
    assert sorted(session.runs, reverse=True) == [4, 4, 2]


async def test_versions_and_wanted_outputs_are_never_mixed(repository: Repository, local: Local) -> None:
    first, second = Recording(2.0), Recording(3.0)
    repository.install({"m": {"1": batched(first), "2": batched(second, version="2")}})
    answers = await asyncio.gather(*(ask(local, 1.0, version=str(1 + number % 2)) for number in range(6)))
    assert (first.runs, second.runs) == ([3], [3])
    assert [float(answer.outputs["y"][0, 0]) for answer in answers] == [2.0, 3.0] * 3


async def test_one_bad_request_does_not_fail_its_neighbours(repository: Repository, local: Local) -> None:
    repository.install({"m": {"1": batched(Recording())}})
    answers = await asyncio.gather(*(ask(local, number) for number in (1.0, -1.0, 3.0)), return_exceptions=True)
    assert isinstance(answers[1], InvalidRequest)
    assert [float(answers[index].outputs["y"][0, 0]) for index in (0, 2)] == [2.0, 6.0]  # type: ignore[union-attr]


async def test_requests_that_come_alone_are_not_held_back_for_others(repository: Repository, local: Local) -> None:
    session = Recording()
    repository.install({"m": {"1": batched(session)}})
    for _ in range(LONELY_TURNS):
        await ask(local, 1.0)
    assert ask(local, 1.0).done()
    together = [ask(local, 1.0) for _ in range(3)]
    assert not any(each.done() for each in together)
    await asyncio.gather(*together)
    assert session.runs[-1] == 3


async def test_what_is_too_late_at_the_end_of_the_turn_is_dropped_not_run(repository: Repository) -> None:
    now = 0.0
    local = Local(repository, "edge", threads=1, clock=lambda: now)
    session = Recording()
    repository.install({"m": {"1": batched(session)}})
    late, patient = ask(local, 1.0, deadline=0.5), ask(local, 2.0)
    now = 1.0
    with pytest.raises(DeadlineExceeded):
        await late
    assert float((await patient).outputs["y"][0, 0]) == 4.0
    assert session.runs == [1]
    await local.close()


async def test_a_version_replaced_in_the_same_turn_still_answers_what_was_asked_of_it(
    repository: Repository, local: Local
) -> None:
    old, new = Recording(2.0), Recording(3.0)
    repository.install({"m": {"1": batched(old)}})
    answers = [ask(local, 1.0) for _ in range(2)]
    repository.install({"m": {"1": batched(new, version="2")}})
    assert [float(answer.outputs["y"][0, 0]) for answer in await asyncio.gather(*answers)] == [2.0, 2.0]
    assert not old.closed_while_running
    await asyncio.to_thread(old.closed.wait, 5)


async def test_what_was_gathered_is_refused_when_the_tier_stops(repository: Repository, local: Local) -> None:
    repository.install({"m": {"1": batched(Recording())}})
    waiting = ask(local, 1.0)
    await local.close()
    with pytest.raises(NotReady, match="stopping"):
        await waiting


async def test_a_caller_that_goes_away_costs_no_run(repository: Repository, local: Local) -> None:
    session = Recording()
    repository.install({"m": {"1": batched(session)}})
    loop = asyncio.get_running_loop()
    request = InferRequest(model="m", inputs={"x": np.ones((1, 2), np.float32)})
    ended: list[BaseException | None] = []
    driven = drive(local.infer(request), lambda _, error: ended.append(error), loop)
    assert driven is not None
    driven.cancel()
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    assert isinstance(ended[0], asyncio.CancelledError)
    assert session.runs == []
    assert repository.lookup("m", None).in_flight == 0


class TwoOutputs(Recording):
    """`y` = 2x, `z` = 3x; computes only what was asked for."""

    def run(self, inputs: Mapping[str, Any], outputs: Sequence[str]) -> list[Any]:
        factors = {"y": 2.0, "z": 3.0}
        self.runs.append(len(inputs["x"]))
        return [inputs["x"] * factors[name] for name in outputs or ("y", "z")]


async def test_requests_for_other_outputs_are_not_answered_with_those_of_the_first(
    repository: Repository, local: Local
) -> None:
    specs = (TensorSpec("y", "FP32", (-1, 2)), TensorSpec("z", "FP32", (-1, 2)))
    session = TwoOutputs()
    session.outputs = specs
    inline, threaded = batched(session), batched(session)
    threaded.inline_elements = 0
    repository.install({"m": {"1": inline}, "slow": {"1": threaded}})
    for model in ("m", "slow"):
        answers = await asyncio.gather(
            *(ask(local, 1.0, model=model, outputs=("y",) if number % 2 else ("z",)) for number in range(40))
        )
        for number, answer in enumerate(answers):
            name, value = ("y", 2.0) if number % 2 else ("z", 3.0)
            assert {key: float(array[0, 0]) for key, array in answer.outputs.items()} == {name: value}


async def test_one_callers_nan_does_not_count_against_the_version_for_its_neighbours(
    repository: Repository, local: Local
) -> None:
    made = batched(Recording())
    repository.install({"m": {"1": made}})
    await asyncio.gather(ask(local, float("nan")), *(ask(local, 1.0) for _ in range(15)))
    assert (made.failures, made.answers) == (0, 15)


async def test_a_model_that_stalls_the_loop_in_a_batch_is_looked_into_and_its_late_answers_are_none(
    repository: Repository, local: Local, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("models.serving.local.STALL_SECONDS", 0.001)

    class Slow(Recording):
        def run(self, inputs: Mapping[str, Any], outputs: Sequence[str]) -> list[Any]:
            ends = time.thread_time() + 0.03
            while time.thread_time() < ends:
                pass
            return super().run(inputs, outputs)

    made = batched(Slow())
    repository.install({"m": {"1": made}})
    deadline = time.monotonic() + 0.02
    late, patient = ask(local, 1.0, deadline=deadline), ask(local, 1.0)
    with pytest.raises(DeadlineExceeded):
        await late
    assert float((await patient).outputs["y"][0, 0]) == 2.0
    while made.in_flight:
        await asyncio.sleep(0.01)
    assert made.inline_elements == 0
    assert "no longer run in the event loop" in caplog.text


async def test_many_models_in_one_turn_take_no_more_of_it_than_one(repository: Repository) -> None:
    now = 0.0

    class Ticking(Recording):
        def run(self, inputs: Mapping[str, Any], outputs: Sequence[str]) -> list[Any]:
            nonlocal now
            now += 0.0002
            return super().run(inputs, outputs)

    local = Local(repository, "edge", threads=1, clock=lambda: now)
    repository.install({f"m{number}": {"1": batched(Ticking())} for number in range(20)})
    waiting = [ask(local, 1.0, model=f"m{number}") for number in range(20)]
    took, before = [], now
    while not all(each.done() for each in waiting):
        await asyncio.sleep(0)
        took.append(now - before)
        before = now
    assert max(took) <= 0.0008
    await local.close()


async def test_whoever_asks_again_when_answered_does_not_push_others_out(repository: Repository) -> None:
    now = 0.0

    class Ticking(Recording):
        def run(self, inputs: Mapping[str, Any], outputs: Sequence[str]) -> list[Any]:
            nonlocal now
            now += 0.001
            return super().run(inputs, outputs)

    local = Local(repository, "edge", threads=1, clock=lambda: now)
    made = batched(Ticking(), rows=1)
    repository.install({"m": {"1": made}})
    made.seconds = 1e-4

    async def twice() -> int:
        for _ in range(2):
            await local.infer(InferRequest(model="m", inputs={"x": np.ones((1, 2), np.float32)}))
        return 2

    loop = asyncio.get_running_loop()
    done: list[Any] = []
    for _ in range(3):
        drive(twice(), lambda result, error: done.append(result or error), loop)
    for _ in range(50):
        await asyncio.sleep(0)
    assert done == [2, 2, 2]
    assert made.in_flight == 0
    await local.close()
