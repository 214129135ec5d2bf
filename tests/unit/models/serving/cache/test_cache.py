"""The cache gives back only what it may: this version's, this tenant's, undegraded, and one run for identical requests."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from msgspec.structs import replace

from models.errors import DeadlineExceeded, EngineFailure, NotFound
from models.serving.cache import Cache
from models.serving.cache import cache as module
from models.serving.drive import drive
from models.serving.predictor import InferRequest, InferResponse
from models.testing import FailingPredictor, SlowPredictor, StaticPredictor

ASKED = InferRequest(model="m", inputs={"x": np.ones(3, np.float32)}, tenant="t", id="a")


class Versions:
    """What answers is `digest`, whatever the name."""

    def __init__(self, digest: bytes = b"one", lasting: bool = True) -> None:
        self.digest = digest
        self.lasting = lasting

    def lookup(self, model: str, version: str | None) -> tuple[bytes, bool]:
        if not self.digest:
            raise NotFound(f"model '{model}' is not served here")
        return self.digest, self.lasting


class Counting:
    """Answers with the number of the run; `before` happens inside each."""

    def __init__(self, before: Callable[[], None] = lambda: None, **fields: Any) -> None:
        self.runs = 0
        self._before = before
        self._fields = fields

    async def infer(self, request: InferRequest) -> InferResponse:
        self.runs += 1
        self._before()
        fields = {"model": request.model, "package": "p", "version": "1", "tier": "edge", "id": request.id}
        return InferResponse(outputs={"y": np.int64([self.runs])}, **fields | self._fields)


class Shared:
    """A second level in a dict."""

    def __init__(self) -> None:
        self.answers: dict[bytes, InferResponse] = {}
        self.asked = 0

    async def get(self, key: bytes) -> InferResponse | None:
        self.asked += 1
        await asyncio.sleep(0)
        return self.answers.get(key)

    def put(self, key: bytes, answer: InferResponse) -> None:
        self.answers[key] = answer


def number(answer: InferResponse) -> int:
    return int(answer.outputs["y"][0])


async def test_the_second_answer_is_the_first_with_the_askers_own_id_and_name() -> None:
    inner = Counting()
    cache = Cache(inner, Versions(), models={"m", "alias"})
    first = await cache.infer(ASKED)
    second = await cache.infer(
        replace(ASKED, id="b", model="alias", client="other", inputs={"x": np.ones(3, np.float32)})
    )
    assert (number(first), number(second), inner.runs) == (1, 1, 1)
    assert (second.id, second.model) == ("b", "alias")
    assert list(second.timings) == ["cache"]
    assert (cache.hits, cache.misses, cache.evictions) == (1, 1, 0)
    assert cache.bytes > 0


@pytest.mark.parametrize(
    "other",
    [
        {"tenant": "u"},
        {"tenant": None},
        {"outputs": ("y",)},
        {"inputs": {"x": np.zeros(3, np.float32)}},
        {"inputs": {"x": np.ones((1, 3), np.float32)}},
    ],
)
async def test_another_question_is_answered_anew(other: dict[str, Any]) -> None:
    inner = Counting()
    cache = Cache(inner, Versions(), models={"m"})
    await cache.infer(ASKED)
    assert number(await cache.infer(replace(ASKED, **other))) == 2


async def test_another_version_never_answers_and_the_first_is_found_again_after_a_rollback() -> None:
    versions, inner = Versions(), Counting()
    cache = Cache(inner, versions, models={"m"})
    await cache.infer(ASKED)
    versions.digest = b"two"
    assert number(await cache.infer(ASKED)) == 2
    versions.digest = b"one"
    assert number(await cache.infer(ASKED)) == 1


async def test_an_answer_of_the_version_swapped_in_meanwhile_is_not_kept_for_the_one_before() -> None:
    versions = Versions()

    def swap() -> None:
        versions.digest = b"two"

    cache = Cache(Counting(before=swap), versions, models={"m"})
    await cache.infer(ASKED)
    versions.digest = b"one"
    assert number(await cache.infer(ASKED)) == 2


async def test_degraded_answers_and_errors_are_never_kept() -> None:
    inner = Counting(degraded=True)
    cache = Cache(inner, Versions(), models={"m"})
    await cache.infer(ASKED)
    await cache.infer(ASKED)
    assert (inner.runs, cache.bytes) == (2, 0)

    failing = FailingPredictor(EngineFailure("broken"))
    cache = Cache(failing, Versions(), models={"m"})
    for _ in range(2):
        with pytest.raises(EngineFailure):
            await cache.infer(ASKED)
    assert len(failing.requests) == 2


async def test_a_model_that_is_not_opted_in_goes_straight_through() -> None:
    inner = Counting()
    cache = Cache(inner, Versions(b""), models={"other"})  # whose identity cannot even be asked
    await cache.infer(ASKED)
    await cache.infer(ASKED)
    assert (inner.runs, cache.misses) == (2, 0)
    chosen = Cache(inner, Versions(), models=lambda name: name.startswith("m"))
    await chosen.infer(ASKED)
    await chosen.infer(ASKED)
    assert inner.runs == 3


async def test_a_model_that_cannot_be_identified_now_is_left_to_whoever_runs_models() -> None:
    versions, inner = Versions(b""), Counting()
    cache = Cache(inner, versions, models={"m"})
    assert [number(await cache.infer(ASKED)) for _ in range(2)] == [1, 2]
    assert cache.bytes == 0


async def test_an_answer_stands_when_its_model_is_unloaded_meanwhile() -> None:
    versions = Versions()

    def unload() -> None:
        versions.digest = b""

    cache = Cache(Counting(before=unload), versions, models={"m"})
    assert number(await cache.infer(ASKED)) == 1
    assert cache.bytes == 0


async def test_a_request_that_is_late_already_is_left_to_the_model_to_refuse() -> None:
    inner = Counting()
    cache = Cache(inner, Versions(), models={"m"}, clock=lambda: 10.0)
    await cache.infer(ASKED)
    await cache.infer(replace(ASKED, deadline=10.0))
    assert inner.runs == 2


async def test_a_hit_takes_no_task() -> None:
    cache = Cache(Counting(), Versions(), models={"m"})
    done: list[InferResponse | None] = []
    loop = asyncio.get_running_loop()
    for _ in range(2):
        assert drive(cache.infer(ASKED), lambda answer, error: done.append(answer), loop) is None
    assert [number(answer) for answer in done if answer] == [1, 1]


# --- single flight ---------------------------------------------------------------------------------------------------


async def settle() -> None:
    for _ in range(5):
        await asyncio.sleep(0)


async def test_identical_requests_wait_for_one_run_and_each_gets_its_own_id() -> None:
    static = StaticPredictor({"y": np.int64([7])})
    slow = SlowPredictor(static)
    cache = Cache(slow, Versions(), models={"m"})
    asked = [asyncio.create_task(cache.infer(replace(ASKED, id=str(index)))) for index in range(5)]
    await settle()
    slow.release.set()
    answers = await asyncio.gather(*asked)
    assert len(static.requests) == 1
    assert [answer.id for answer in answers] == ["0", "1", "2", "3", "4"]
    assert (cache.hits, cache.misses) == (4, 1)
    with pytest.raises(ValueError, match="read-only"):
        answers[1].outputs["y"][0] = 8


async def test_waiting_for_anothers_run_needs_no_task() -> None:
    slow = SlowPredictor(StaticPredictor({"y": np.int64([7])}))
    cache = Cache(slow, Versions(), models={"m"})
    leader = asyncio.create_task(cache.infer(ASKED))
    await slow.asked.wait()
    before = len(asyncio.all_tasks())
    done: list[InferResponse | None] = []
    driven = drive(cache.infer(ASKED), lambda answer, error: done.append(answer), asyncio.get_running_loop())
    assert driven is not None
    assert len(asyncio.all_tasks()) == before
    slow.release.set()
    await leader
    await settle()
    assert done
    assert done[0] is not None
    assert number(done[0]) == 7


async def test_a_waiters_deadline_holds() -> None:
    slow = SlowPredictor(StaticPredictor({"y": np.int64([7])}))
    loop = asyncio.get_running_loop()
    cache = Cache(slow, Versions(), models={"m"}, clock=loop.time)
    leader = asyncio.create_task(cache.infer(ASKED))
    await slow.asked.wait()
    with pytest.raises(DeadlineExceeded):
        await cache.infer(replace(ASKED, deadline=loop.time() + 0.01))
    slow.release.set()
    assert number(await leader) == 7


@pytest.mark.parametrize("way", ["fails", "is cancelled"])
async def test_when_the_first_fails_or_goes_the_others_run_themselves(way: str) -> None:
    static = StaticPredictor({"y": np.int64([7])})
    hold = asyncio.Event()

    class FirstBreaks:
        runs = 0

        async def infer(self, request: InferRequest) -> InferResponse:
            self.runs += 1
            if self.runs == 1:
                await hold.wait()
                raise EngineFailure("broken")
            return await static.infer(request)

    cache = Cache(FirstBreaks(), Versions(), models={"m"})
    leader = asyncio.create_task(cache.infer(ASKED))
    await settle()
    followers = [asyncio.create_task(cache.infer(replace(ASKED, id=str(index)))) for index in range(3)]
    await settle()
    if way == "fails":
        hold.set()
    else:
        leader.cancel()
    answers = await asyncio.gather(*followers)
    assert [number(answer) for answer in answers] == [7, 7, 7]
    with pytest.raises((EngineFailure, asyncio.CancelledError)):
        await leader
    assert number(await cache.infer(ASKED)) == 7


async def test_a_cancelled_waiter_disturbs_nobody() -> None:
    slow = SlowPredictor(StaticPredictor({"y": np.int64([7])}))
    cache = Cache(slow, Versions(), models={"m"})
    leader = asyncio.create_task(cache.infer(ASKED))
    await slow.asked.wait()
    gone, stays = (asyncio.create_task(cache.infer(ASKED)) for _ in range(2))
    await settle()
    gone.cancel()
    slow.release.set()
    assert number(await stays) == number(await leader) == 7
    assert slow.cancelled == 0


async def test_an_urgent_request_does_not_wait_behind_a_job_of_low_priority() -> None:
    static = StaticPredictor({"y": np.int64([7])})
    slow = SlowPredictor(static)
    cache = Cache(slow, Versions(), models={"m"})
    asked = [asyncio.create_task(cache.infer(replace(ASKED, priority=priority))) for priority in (3, 0, 1)]
    await settle()
    slow.release.set()
    await asyncio.gather(*asked)
    assert len(static.requests) == 3


async def test_waiters_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MAX_FOLLOWERS", 2)
    static = StaticPredictor({"y": np.int64([7])})
    slow = SlowPredictor(static)
    cache = Cache(slow, Versions(), models={"m"})
    asked = [asyncio.create_task(cache.infer(ASKED)) for _ in range(5)]
    await settle()
    slow.release.set()
    await asyncio.gather(*asked)
    assert len(static.requests) == 3


# --- the second level ------------------------------------------------------------------------------------------------


async def test_what_another_process_answered_is_given_and_kept_here() -> None:
    shared, inner = Shared(), Counting()
    await Cache(inner, Versions(), models={"m"}, second=shared).infer(ASKED)
    other = Cache(inner, Versions(), models={"m"}, second=shared)
    assert number(await other.infer(replace(ASKED, id="b"))) == 1
    assert number(await other.infer(ASKED)) == 1
    assert (inner.runs, shared.asked, other.hits, other.misses) == (1, 2, 2, 0)


async def test_a_model_without_a_digest_never_leaves_the_process() -> None:
    shared, inner = Shared(), Counting()
    await Cache(inner, Versions(lasting=False), models={"m"}, second=shared).infer(ASKED)
    assert (shared.asked, shared.answers) == (0, {})


async def test_the_second_level_is_asked_no_longer_than_the_deadline() -> None:
    class Stuck(Shared):
        async def get(self, key: bytes) -> InferResponse | None:
            await asyncio.Event().wait()
            return None

    inner = Counting()
    loop = asyncio.get_running_loop()
    cache = Cache(inner, Versions(), models={"m"}, second=Stuck(), clock=loop.time)
    assert number(await cache.infer(replace(ASKED, deadline=loop.time() + 0.01))) == 1
