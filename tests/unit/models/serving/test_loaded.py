from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from session_fake import FakeSession, loaded

from models.errors import EngineFailure, InvalidRequest
from models.serving.loaded import CLEAN_ANSWERS, Identity, Loaded, blank_row, first_row, measure
from models.tensor import TensorSpec

GOOD = [np.ones((1, 2), np.float32)]
NAN = [np.full((1, 2), np.nan, np.float32)]
SAMPLE = {"x": np.ones((1, 2), np.float32)}
BROKEN = EngineFailure("engine: index 99 is out of bounds" + "." * 1000)


def test_a_short_run_may_hold_the_loop_in_proportion_to_its_input() -> None:
    sample = {"x": np.ones((1, 2), np.float32)}
    made = Loaded(Identity("p", "1", "fake"), FakeSession(), sample=sample)
    assert made.inline
    most = max(rows for rows, took in made.batching.times.items() if took <= 0.0002)
    assert made.inline_elements == int(most * 2 * 0.0002 / made.batching.times[most])
    assert made.runs_here(2)
    assert not made.runs_here(made.inline_elements + 1)


def test_a_version_that_was_not_measured_never_holds_the_loop() -> None:
    assert not Loaded(Identity("p", "1", "fake"), FakeSession()).inline


def test_a_session_whose_runs_take_turns_never_holds_the_loop_while_one_is_under_way() -> None:
    session: Any = FakeSession()
    session.serial = True
    made = loaded(session)
    made.inline_elements = 100
    assert made.runs_here(2)
    made.in_threads = 1
    assert not made.runs_here(2)


def test_measuring_a_slow_model_is_cut_short(monkeypatch: pytest.MonkeyPatch) -> None:
    now = iter(range(100))
    monkeypatch.setattr("models.serving.loaded.time.perf_counter", lambda: next(now))
    session = FakeSession()
    assert measure(session, {"x": np.ones((1, 2), np.float32)}) == 1.0
    assert len(session.asked) == 2  # one to warm up, one measured


def test_the_last_run_under_way_makes_a_retired_version_idle() -> None:
    idle: list[Loaded] = []
    made = loaded(FakeSession())
    made.acquire()
    made.acquire()
    made.retire(idle.append)
    made.retire(idle.append)
    made.release()
    assert idle == []
    made.release()
    assert idle == [made]


@pytest.mark.parametrize(
    ("answers", "bad"),
    [
        (["f"] * 4, False),
        (["f"] * 5, True),
        (["n"] * 5, True),
        (["g"] * 20 + ["f"] * 5, False),
        (["g"] * 19 + ["f"] * 5, True),
        (["g"] * 50, False),
    ],
)
def test_bad_is_five_failures_and_more_than_a_fifth(answers: list[str], bad: bool) -> None:
    made = loaded(FakeSession())
    for answer in answers:
        if answer == "f":
            made.failed()
        else:
            made.answered(SAMPLE, GOOD if answer == "g" else NAN)
    assert made.is_bad is bad


def test_outputs_are_looked_through_again_after_a_failure() -> None:
    made = loaded(FakeSession())
    for _ in range(CLEAN_ANSWERS):
        made.answered(SAMPLE, GOOD)
    made.answered(SAMPLE, NAN)
    assert made.failures == 0
    made.failed()
    made.answered(SAMPLE, NAN)
    assert made.failures == 2


def test_the_first_row_is_cut_from_inputs_that_have_rows() -> None:
    specs = [TensorSpec("x", "FP32", (-1, 2)), TensorSpec("k", "INT64", (3,))]
    row = first_row(specs, {"x": np.ones((5, 2)), "k": np.arange(3)})
    assert (row["x"].shape, row["k"].shape) == ((1, 2), (3,))


def test_a_blank_row_has_the_smallest_shape_allowed() -> None:
    row = blank_row([TensorSpec("x", "INT8", (-1, 2, -1)), TensorSpec("t", "BYTES", (-1,))])
    assert (row["x"].shape, row["x"].dtype) == ((1, 2, 1), np.dtype(np.int8))
    assert row["t"].tolist() == [b""]


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_an_answer_to_inputs_that_are_not_finite_says_nothing_about_the_model(value: float) -> None:
    made = loaded(FakeSession())
    for _ in range(CLEAN_ANSWERS):
        made.answered({"x": np.full((1, 2), value, np.float32)}, NAN)
    assert (made.answers, made.failures, made.clean) == (0, 0, 0)


def test_inputs_are_refused_while_the_sample_is_answered_and_it_is_tried_once_a_second(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    session = FakeSession()
    made = Loaded(Identity("p", "1", "fake"), session, sample=SAMPLE)
    now = [100.0]
    monkeypatch.setattr("models.serving.loaded.time.monotonic", lambda: now[0])
    measured = len(session.asked)
    for _ in range(5):
        with pytest.raises(InvalidRequest, match="the model refuses these inputs: engine: index 99") as refused:
            made.refuse(BROKEN)
        assert len(str(refused.value)) < 400
    assert len(session.asked) == measured + 1
    session.error = BROKEN
    now[0] += 1.0
    for _ in range(5):
        made.refuse(BROKEN)
    assert len(session.asked) == measured + 2


def test_the_sample_of_a_slow_model_is_tried_more_rarely(monkeypatch: pytest.MonkeyPatch) -> None:
    session = FakeSession()
    made = Loaded(Identity("p", "1", "fake"), session, sample=SAMPLE)
    now = [100.0]
    monkeypatch.setattr("models.serving.loaded.time.monotonic", lambda: now[0])
    measured = len(session.asked)
    plain = session.run

    def slow(inputs: Any, outputs: Any) -> list[Any]:
        now[0] += 2.0
        return plain(inputs, outputs)

    monkeypatch.setattr(session, "run", slow)
    for _ in range(30):
        with pytest.raises(InvalidRequest):
            made.refuse(BROKEN)
        now[0] += 1.0
    assert len(session.asked) == measured + 2


def test_without_a_sample_the_engine_is_believed() -> None:
    loaded(FakeSession()).refuse(BROKEN)


def test_the_first_row_does_not_keep_the_others_in_memory() -> None:
    assert first_row([TensorSpec("x", "FP32", (-1, 2))], {"x": np.ones((5, 2))})["x"].base is None


def test_a_version_without_a_sample_learns_one_from_small_inputs_that_were_answered() -> None:
    made = loaded(FakeSession())
    made.learn({"x": np.ones((1 << 15, 2), np.float32)})
    made.refuse(BROKEN)
    made.learn(SAMPLE)
    with pytest.raises(InvalidRequest, match="refuses these inputs"):
        made.refuse(BROKEN)
