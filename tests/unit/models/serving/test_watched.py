"""Live traffic is counted, a newcomer is compared with its predecessor off the request path, and the repository hears of it."""

from __future__ import annotations

import asyncio
import threading
import time
from pathlib import Path

import numpy as np
import pytest
from package_writer import desired_body, scale_package
from session_fake import FakeSession, loaded

from models.errors import DeadlineExceeded, EngineFailure
from models.manifest import Confidence
from models.serving.local import Local
from models.serving.predictor import InferRequest, InferResponse
from models.serving.quality import BASELINE_ANSWERS, Rules
from models.serving.quality_watch import QualityWatch, Serving
from models.serving.repository import Repository
from models.serving.watched import Watched

X = np.ones((1, 2), np.float32)
RANDOM = np.random.default_rng(1)


class Fixed:
    """A predictor that answers what it is told."""

    def __init__(self) -> None:
        self.scores = np.array([[0.1, 0.9]], np.float32)
        self.version = "2"
        self.error: Exception | None = None

    async def infer(self, request: InferRequest) -> InferResponse:
        if self.error is not None:
            raise self.error
        return InferResponse(
            outputs={"y": self.scores},
            model=request.model,
            package="fake",
            version=self.version,
            tier="edge",
            confidence=0.9,
            timings={"queue": 0.0, "compute": 0.001},
            batch=1,
        )


@pytest.fixture
def quality() -> QualityWatch:
    made = QualityWatch(rules=Rules(shadow_share=1.0))
    made.begin({"m": Serving("fake", "1", True, None)})
    made.begin({"m": Serving("fake", "2", True, None)})
    return made


async def ask(watched: Watched, count: int = 1, **fields: object) -> None:
    """No two inputs alike."""
    for _ in range(count):
        x = RANDOM.uniform(size=X.shape).astype(X.dtype)
        await watched.infer(InferRequest(model="m", inputs={"x": x}, **fields))


async def test_answers_failures_and_lateness_are_counted_for_the_version_that_answered(quality: QualityWatch) -> None:
    here = Fixed()
    watched = Watched(here, quality, lambda model: None)
    await ask(watched, 10)
    here.version = "1"
    await ask(watched)
    for error in (EngineFailure("broken"), DeadlineExceeded("late")):
        here.error = error
        with pytest.raises(type(error)):
            await ask(watched)
    record = quality.live["m"]
    assert (record.key, record.answers, record.errors, record.late) == ("fake/2", 10, 1, 1)
    assert sum(record.latency) == 10


async def test_answers_that_are_not_finite_are_found_in_a_newcomer(quality: QualityWatch) -> None:
    here = Fixed()
    here.scores = np.array([[np.nan, 1.0]], np.float32)
    watched = Watched(here, quality, lambda model: None)
    await ask(watched, 80)
    fault = quality.fault()
    assert fault is not None
    assert fault.startswith("model 'm' (fake/2): answers that are not finite: 10 of 10")


async def test_inputs_that_are_not_finite_say_nothing_of_the_model(quality: QualityWatch) -> None:
    here = Fixed()
    here.scores = np.array([[np.nan, 1.0]], np.float32)
    watched = Watched(here, quality, lambda model: None)
    for _ in range(80):
        await watched.infer(InferRequest(model="m", inputs={"x": X * np.nan}))
    assert quality.fault() is None


class Scores(FakeSession):
    def run(self, inputs, outputs):
        return [np.array([[0.9, 0.1]], np.float32) for _ in super().run(inputs, outputs)]


async def compared(watched: Watched, quality: QualityWatch, count: int) -> None:
    async with asyncio.timeout(5):
        while quality.live["m"].compared < count:
            await ask(watched)
            await asyncio.sleep(0.001)


async def test_the_previous_version_is_asked_off_the_request_path_and_disagreement_is_counted(
    quality: QualityWatch,
) -> None:
    session = Scores()
    previous = loaded(session, confidence=Confidence("y"))
    watched = Watched(Fixed(), quality, lambda model: previous)
    await compared(watched, quality, 20)
    assert quality.live["m"].differed == quality.live["m"].compared
    assert {name.rpartition("_")[0] for name in session.threads} == {"tierline-shadow"}
    fault = quality.fault()
    assert fault is not None
    assert "otherwise than by the previous version" in fault
    assert previous.in_flight == previous.in_threads == 0
    await watched.close()


async def test_a_caller_who_repeats_himself_is_one_input(quality: QualityWatch) -> None:
    session = Scores()
    previous = loaded(session, confidence=Confidence("y"))
    watched = Watched(Fixed(), quality, lambda model: previous)
    for _ in range(30):
        await watched.infer(InferRequest(model="m", inputs={"x": X}))
        await asyncio.sleep(0.001)
    async with asyncio.timeout(5):
        while previous.in_flight:
            await asyncio.sleep(0.001)
    assert len(session.asked) == 1
    assert quality.live["m"].compared == 1
    await watched.close()


async def test_a_previous_version_that_hangs_delays_no_answer(quality: QualityWatch) -> None:
    session = Scores()
    session.gate.clear()
    previous = loaded(session, confidence=Confidence("y"))
    watched = Watched(Fixed(), quality, lambda model: previous)
    async with asyncio.timeout(1):
        await ask(watched, 200)
    assert previous.in_flight == 1, "one comparison at a time"
    session.gate.set()
    await compared(watched, quality, 1)
    await watched.close()


async def test_nothing_is_compared_while_requests_wait_or_beyond_its_share(quality: QualityWatch) -> None:
    session, time = Scores(), [0.0]
    previous = loaded(session, confidence=Confidence("y"))
    waiting = [True]
    watched = Watched(Fixed(), quality, lambda model: previous, busy=lambda: waiting[0], clock=lambda: time[0])
    await ask(watched, 50)
    assert session.asked == []
    waiting[0] = False
    await ask(watched)
    time[0] = 1.0
    async with asyncio.timeout(5):
        while previous.in_flight:
            await asyncio.sleep(0.001)
    await ask(watched, 50)
    assert len(session.asked) == 1, "it took a second, and its share is one half of the time"
    await watched.close()


async def test_numbers_that_may_be_better_are_not_compared(quality: QualityWatch) -> None:
    session = Scores()
    watched = Watched(Fixed(), quality, lambda model: loaded(session))
    await ask(watched, 50)
    assert session.asked == []
    assert quality.standing(shadowing=True).startswith("good so far")


# --- with a repository --------------------------------------------------------------------------------------------------


async def commit(repository: Repository, package) -> None:
    body, blobs = desired_body(m=package)
    await repository.commit(await repository.prepare(body, blobs))


async def test_the_replaced_version_stays_until_the_probation_is_over_and_going_back_needs_no_loading(
    tmp_path: Path,
) -> None:
    quality = QualityWatch(tmp_path / "quality.json")
    repository = Repository(engines=("onnx",), quality=quality)
    one, two = scale_package(tmp_path, 2.0), scale_package(tmp_path, 3.0, version="2")
    await commit(repository, one)
    first = repository.lookup("m", None)
    await commit(repository, two)
    assert repository.replaced("m") is first
    await commit(repository, one)
    assert repository.lookup("m", None) is first
    assert not first.retired
    replaced = repository.replaced("m")
    assert replaced is not None
    repository.settled()
    assert repository.replaced("m") is None
    assert replaced.retired
    await repository.close()


async def test_a_version_proves_itself_by_real_inferences_and_is_then_still_watched(tmp_path: Path) -> None:
    quality = QualityWatch(rules=Rules(answers=30, watch_answers=100))
    repository = Repository(engines=("onnx",), quality=quality)
    local = Local(repository, "edge")
    watched = Watched(local, quality, repository.replaced)
    await commit(repository, scale_package(tmp_path, 2.0))
    x = {"x": np.ones((1, 4), np.float32)}
    verdicts = []
    for _ in range(110):
        await watched.infer(InferRequest(model="m", inputs=x))
        verdicts.append(repository.verdict())
    assert verdicts[28] == "undecided: 29 of 30 answers"
    assert verdicts[29].startswith("good so far: 30 answers")
    assert verdicts[-1] == "good"
    await watched.close()
    await local.close()
    await repository.close()


async def test_what_traffic_said_outlives_the_process_and_a_torn_file_is_no_harm(tmp_path: Path) -> None:
    path = tmp_path / "quality.json"
    before = QualityWatch(path)
    before.begin({"m": Serving("fake", "1", True, None)})
    for _ in range(60):
        before.live["m"].add(0.001)
    before.save()
    after = QualityWatch(path)
    after.begin({"m": Serving("fake", "2", True, None)})
    for _ in range(40):
        after.live["m"].add(1.0)
    assert "run time" in (after.fault() or "")
    path.write_bytes(path.read_bytes()[:-20])
    torn = QualityWatch(path)
    torn.begin({"m": Serving("fake", "2", True, None)})
    assert torn.fault() is None


async def test_a_version_that_was_found_bad_is_nothing_to_compare_with() -> None:
    quality = QualityWatch()
    quality.begin({"m": Serving("fake", "1", True, None)})
    quality.begin({"m": Serving("fake", "2", True, None)})
    quality.live["m"].errors = 30
    assert quality.fault() is not None
    quality.begin({"m": Serving("fake", "1", True, None)})
    quality.begin({"m": Serving("fake", "3", True, None)})
    old = quality.newcomers["m"].old
    assert old is not None
    assert old.version == "1"


async def test_a_previous_version_that_still_answers_what_it_began_is_left_alone(quality: QualityWatch) -> None:
    session = Scores()
    previous = loaded(session, confidence=Confidence("y"))
    previous.acquire()
    watched = Watched(Fixed(), quality, lambda model: previous)
    await ask(watched, 50)
    assert session.asked == []
    previous.release()
    await compared(watched, quality, 1)
    await watched.close()


# --- what says nothing of a version ---------------------------------------------------------------------------------------


async def test_callers_who_give_no_time_cannot_take_a_version_back(tmp_path: Path) -> None:
    quality = QualityWatch()
    repository = Repository(engines=("onnx",), quality=quality)
    local = Local(repository, "edge")
    watched = Watched(local, quality, repository.replaced)
    x = {"x": np.ones((1, 4), np.float32)}
    for version in ("1", "2"):
        await commit(repository, scale_package(tmp_path, 2.0, version=version))
        for _ in range(60):
            await watched.infer(InferRequest(model="m", inputs=x))
    for _ in range(60):
        with pytest.raises(DeadlineExceeded):
            await watched.infer(InferRequest(model="m", inputs=x, deadline=time.monotonic() - 1))
    assert not repository.verdict().startswith("bad")
    await watched.close()
    await local.close()
    await repository.close()


async def test_late_counts_from_the_time_that_the_previous_version_needs() -> None:
    quality = QualityWatch()
    quality.begin({"m": Serving("fake", "1", True, None)})
    for _ in range(60):
        quality.live["m"].add(0.010)
    quality.begin({"m": Serving("fake", "2", True, None)})
    here = Fixed()
    here.error = DeadlineExceeded("late")
    watched = Watched(here, quality, lambda model: None, clock=lambda: 100.0)
    for deadline in (100.002, 100.005, 100.1):
        with pytest.raises(DeadlineExceeded):
            await ask(watched, deadline=deadline)
    assert quality.live["m"].late == 1


async def test_a_version_on_probation_is_judged_on_when_another_model_comes(tmp_path: Path) -> None:
    quality = QualityWatch()
    repository = Repository(engines=("onnx",), quality=quality)
    one, two, other = (
        scale_package(tmp_path, 2.0),
        scale_package(tmp_path, 3.0, version="2"),
        scale_package(tmp_path, 5.0, version="7"),
    )

    async def together(**packages) -> None:
        body, blobs = desired_body(**packages)
        await repository.commit(await repository.prepare(body, blobs))

    await together(m=one)
    repository.settled()
    first = repository.lookup("m", None)
    await together(m=two)
    await together(m=two, n=other)
    assert repository.replaced("m") is first
    assert set(quality.newcomers) == {"m", "n"}
    quality.live["m"].errors = 100
    assert repository.verdict().startswith("bad: model 'm' (scale/2)")
    repository.settled()
    await together(m=two)
    assert set(quality.newcomers) == set(), "its probation is over"
    await repository.close()


async def test_a_model_that_is_seldom_asked_does_not_hide_behind_a_busy_one() -> None:
    quality = QualityWatch(rules=Rules(watch_answers=100))
    quality.begin({"busy": Serving("a", "1", True, None), "rare": Serving("b", "1", True, None)})
    for _ in range(100):
        quality.live["busy"].add(0.001)
    assert quality.standing(shadowing=False).startswith("good so far: 100 answers")
    for _ in range(100):
        quality.live["rare"].add(0.001)
    assert quality.standing(shadowing=False) == "good"


async def test_once_a_version_is_watched_no_longer_its_answers_are_not_looked_through(quality: QualityWatch) -> None:
    quality.configure({"watch_answers": 40})
    here = Fixed()
    watched = Watched(here, quality, lambda model: None)
    await ask(watched, 40)
    looked = quality.live["m"].looked
    assert looked > 0
    await ask(watched, 200)
    assert quality.live["m"].looked == looked


async def test_the_past_weighs_half_once_it_is_long(quality: QualityWatch) -> None:
    watched = Watched(Fixed(), quality, lambda model: None)
    quality.live["m"].answers = BASELINE_ANSWERS
    await ask(watched)
    assert quality.live["m"].answers == (BASELINE_ANSWERS + 1) // 2


def test_settings_that_say_nothing_leave_the_rules_it_was_made_with() -> None:
    quality = QualityWatch(rules=Rules(shadow=False))
    quality.configure({"answers": 5})
    assert (quality.rules.shadow, quality.rules.answers) == (False, 5)
    quality.configure({"shadow": True})
    assert (quality.rules.shadow, quality.rules.answers) == (True, 20)


@pytest.mark.parametrize("left", [b'{"m\xff":[]}', b"\0" * 4096, b"", b'{"m":1}'])
def test_whatever_a_power_cut_left_of_the_counts_the_node_starts(tmp_path: Path, left: bytes) -> None:
    (tmp_path / "quality.json").write_bytes(left)
    assert QualityWatch(tmp_path / "quality.json").live == {}


async def test_the_event_loop_does_not_wait_for_the_disk_that_keeps_the_counts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    quality = QualityWatch(tmp_path / "quality.json")
    repository = Repository(engines=("onnx",), quality=quality)
    threads: list[str] = []
    monkeypatch.setattr(quality, "save", lambda: threads.append(threading.current_thread().name))
    await commit(repository, scale_package(tmp_path, 2.0))
    await repository.close()
    assert len(threads) == 2
    assert all(name.startswith("tierline-close") for name in threads)
