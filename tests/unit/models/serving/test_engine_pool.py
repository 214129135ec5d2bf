"""Long models run in threads: in batches where that pays, the quick ones past the slow ones, and none for ever."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Mapping, Sequence
from typing import Any

import numpy as np
import pytest
from session_fake import WAIT_SECONDS, FakeSession, loaded

from models.errors import DeadlineExceeded, EngineFailure, InvalidRequest, NotReady, Overloaded
from models.serving import engine_pool
from models.serving.batching import Batching
from models.serving.local import Local
from models.serving.predictor import InferRequest, InferResponse
from models.serving.repository import Repository


@pytest.fixture
async def repository() -> AsyncIterator[Repository]:
    made = Repository(engines=())
    yield made
    await made.close()


@pytest.fixture
async def local(repository: Repository) -> AsyncIterator[Local]:
    made = Local(repository, "edge", threads=1, max_waiting=64)
    yield made
    await made.close()


def ask(local: Local, number: float = 1.0, model: str = "m", **changes: Any) -> asyncio.Task[InferResponse]:
    inputs = {"x": np.full((1, 2), number, np.float32)}
    return asyncio.create_task(local.infer(InferRequest(**{"model": model, "inputs": inputs, **changes})))


class Doubling(FakeSession):
    def __init__(self) -> None:
        super().__init__()
        self.rows: list[int] = []

    def run(self, inputs: Mapping[str, Any], outputs: Sequence[str]) -> list[Any]:
        self.rows.append(len(inputs["x"]))
        super().run(inputs, outputs)
        if (inputs["x"] < 0).any():
            raise EngineFailure("negative")
        return [inputs["x"] * 2]


async def test_what_waits_for_a_thread_is_run_together_and_split_again(repository: Repository, local: Local) -> None:
    session = Doubling()
    made = loaded(session)
    made.batching = Batching(8, "")
    repository.install({"m": {"1": made}})
    session.gate.clear()
    first = ask(local, 0)
    await asyncio.to_thread(session.started.acquire, timeout=5)
    others = [ask(local, number) for number in range(1, 6)]
    await asyncio.sleep(0)
    session.gate.set()
    answers = await asyncio.gather(first, *others)
    assert session.rows == [1, 5]
    assert [float(answer.outputs["y"][0, 0]) for answer in answers] == [0.0, 2.0, 4.0, 6.0, 8.0, 10.0]


async def test_a_bad_request_in_a_batch_fails_alone(repository: Repository, local: Local) -> None:
    session = Doubling()
    made = loaded(session)
    made.batching = Batching(8, "")
    repository.install({"m": {"1": made}})
    session.gate.clear()
    first = ask(local, 0)
    await asyncio.to_thread(session.started.acquire, timeout=5)
    others = [ask(local, number) for number in (1, -1, 3)]
    await asyncio.sleep(0)
    session.gate.set()
    await first
    answers = await asyncio.gather(*others, return_exceptions=True)
    assert isinstance(answers[1], EngineFailure | InvalidRequest)
    assert [float(answers[place].outputs["y"][0, 0]) for place in (0, 2)] == [2.0, 6.0]  # type: ignore[union-attr]


async def test_a_quick_model_passes_a_slow_one_that_holds_every_thread(repository: Repository, local: Local) -> None:
    slow, quick = FakeSession(), FakeSession()
    slow.gate.clear()
    first, second = loaded(slow), loaded(quick)
    first.pace, second.pace = 1.0, 0.001
    repository.install({"slow": {"1": first}, "quick": {"1": second}})
    held = [ask(local, model="slow") for _ in range(3)]
    await asyncio.to_thread(slow.started.acquire, timeout=5)
    answer = await asyncio.wait_for(ask(local, model="quick"), 5)
    assert answer.package == "fake"
    slow.gate.set()
    await asyncio.gather(*held)


async def test_no_more_long_runs_at_once_than_cores_that_are_left(
    repository: Repository, monkeypatch: pytest.MonkeyPatch
) -> None:
    cores = 2
    monkeypatch.setattr(engine_pool, "usable_cores", lambda: cores)
    monkeypatch.setattr(engine_pool, "COUNT_SECONDS", 0.0)
    local = Local(repository, "edge")
    slow, quick = FakeSession(), FakeSession()
    first, second = loaded(slow), loaded(quick)
    first.pace, second.pace = 1.0, 0.001
    repository.install({"slow": {"1": first}, "quick": {"1": second}})
    await ask(local, model="slow")
    assert slow.started.acquire(timeout=0)

    cores = 1
    slow.gate.clear()
    held = [ask(local, model="slow") for _ in range(3)]
    await asyncio.to_thread(slow.started.acquire, timeout=WAIT_SECONDS)
    await asyncio.wait_for(ask(local, model="quick"), 5)
    assert slow.running == 1

    cores = 2
    held.append(ask(local, model="slow"))
    assert await asyncio.to_thread(slow.started.acquire, timeout=WAIT_SECONDS)
    assert slow.running == 2
    slow.gate.set()
    await asyncio.gather(*held)
    await local.close()


async def test_on_one_core_short_runs_are_made_one_after_the_other_and_a_long_one_gets_its_turn(
    repository: Repository, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engine_pool, "usable_cores", lambda: 1)
    monkeypatch.setattr(engine_pool, "COUNT_SECONDS", 0.0)
    local = Local(repository, "edge", threads=None)
    slow, quick = FakeSession(), FakeSession()
    first, second = loaded(slow), loaded(quick)
    first.pace, second.pace = 1.0, 0.001
    repository.install({"slow": {"1": first}, "quick": {"1": second}})
    quick.gate.clear()
    asked = [ask(local, model="quick") for _ in range(4)]
    await asyncio.to_thread(quick.started.acquire, timeout=WAIT_SECONDS)
    asked += [ask(local, model="slow"), *(ask(local, model="quick") for _ in range(4))]
    quick.gate.set()
    await asyncio.wait_for(asyncio.gather(*asked), WAIT_SECONDS)
    assert quick.most_running == 1
    await local.close()


async def test_a_thread_outlives_what_nobody_expected(repository: Repository, local: Local) -> None:
    session = FakeSession()
    session.error = ZeroDivisionError("a bug")
    repository.install({"m": {"1": loaded(session)}})
    with pytest.raises(EngineFailure, match="unexpectedly"):
        await ask(local)
    session.error = None
    assert (await asyncio.wait_for(ask(local), 5)).version == "1"


async def test_what_cannot_be_in_time_is_refused_at_once_and_not_after_the_wait(
    repository: Repository, local: Local
) -> None:
    session = FakeSession()
    session.gate.clear()
    made = loaded(session)
    made.pace = 0.5
    repository.install({"m": {"1": made}})
    held = [ask(local) for _ in range(3)]
    await asyncio.to_thread(session.started.acquire, timeout=5)
    clock = asyncio.get_running_loop().time
    with pytest.raises(Overloaded, match="of work wait"):
        await local.infer(InferRequest(model="m", inputs={"x": np.ones((1, 2), np.float32)}, deadline=clock() + 0.6))
    session.gate.set()
    await asyncio.gather(*held)


class Hanging(FakeSession):
    """Runs until it is stopped; one that cannot be stopped runs until the gate is opened."""

    def __init__(self, *, stoppable: bool) -> None:
        super().__init__()
        self._stoppable = stoppable
        self._stopped = threading.Event()

    def run(self, inputs: Mapping[str, Any], outputs: Sequence[str]) -> list[Any]:
        self.started.release()
        if self._stoppable:
            assert self._stopped.wait(WAIT_SECONDS)
            self._stopped.clear()
            raise EngineFailure("stopped")
        return super().run(inputs, outputs)

    def stop(self) -> bool:
        self._stopped.set()
        return self._stoppable


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine_pool, "WAIT_SECONDS", 0.02)
    monkeypatch.setattr(engine_pool, "STOP_SECONDS", 0.05)


@pytest.mark.usefixtures("impatient")
async def test_a_run_that_hangs_is_stopped_and_its_thread_goes_on(repository: Repository, local: Local) -> None:
    hanging, good = loaded(Hanging(stoppable=True)), loaded(FakeSession())
    hanging.max_run_seconds = 0.05
    repository.install({"hanging": {"1": hanging}, "good": {"1": good}})
    with pytest.raises(EngineFailure, match="stopped"):
        await asyncio.wait_for(ask(local, model="hanging"), 5)
    assert not hanging.stuck
    assert (await asyncio.wait_for(ask(local, model="good"), 5)).version == "1"


@pytest.mark.usefixtures("impatient")
async def test_a_run_that_cannot_be_stopped_loses_its_thread_and_its_model_but_nothing_else(
    repository: Repository, local: Local
) -> None:
    session = Hanging(stoppable=False)
    session.gate.clear()
    hanging, good = loaded(session), loaded(FakeSession())
    hanging.max_run_seconds = 0.05
    repository.install({"hanging": {"1": hanging}, "good": {"1": good}})
    deadline = asyncio.get_running_loop().time() + 0.3
    with pytest.raises(DeadlineExceeded):
        await asyncio.wait_for(ask(local, model="hanging", deadline=deadline), 5)
    assert (await asyncio.wait_for(ask(local, model="good"), 5)).version == "1"
    with pytest.raises(NotReady, match="stuck"):
        await ask(local, model="hanging")
    session.gate.set()


@pytest.mark.usefixtures("impatient")
async def test_stopping_one_run_does_not_fail_another_of_the_same_session(repository: Repository) -> None:
    class Shared(FakeSession):
        """As onnxruntime: stopping ends every run under way. Inputs of 1 run until stopped, others for a while."""

        def __init__(self) -> None:
            super().__init__()
            self.stops = threading.Condition()
            self.count = 0

        def run(self, inputs: Mapping[str, Any], outputs: Sequence[str]) -> list[Any]:
            before = self.count
            with self.stops:
                hangs = inputs["x"][0, 0] == 1
                if self.stops.wait_for(lambda: self.count > before, WAIT_SECONDS if hangs else 0.2):
                    raise EngineFailure("stopped")
            return super().run(inputs, outputs)

        def stop(self) -> bool:
            with self.stops:
                self.count += 1
                self.stops.notify_all()
            return True

    local = Local(repository, "edge", threads=2)
    made = loaded(Shared())
    made.max_run_seconds = 0.25
    repository.install({"m": {"1": made}})
    hanging = ask(local, 1)
    await asyncio.sleep(0.15)
    innocent = ask(local, 2)
    assert (await asyncio.wait_for(innocent, 5)).version == "1"
    with pytest.raises(EngineFailure, match="was stopped after"):
        await asyncio.wait_for(hanging, 5)
    assert made.failures == 1
    await local.close()
