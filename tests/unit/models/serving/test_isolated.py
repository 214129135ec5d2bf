from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from onnx_writer import Node, OnnxWriter, Value, write_model
from tiny_models import SUM, write

from models.engines import EngineOptions
from models.errors import ContractBreach, EngineFailure, InvalidRequest, NotReady
from models.serving import isolated, isolated_wire
from models.serving.isolated import Backoff, IsolatedSession, IsolationLimits
from models.serving.isolated_wire import BrokenFrame, receive, send

X = {"x": np.ones((1, 4), np.float32)}
Open = Callable[..., IsolatedSession]


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def opened(clock: Clock) -> Iterator[Open]:
    made: list[IsolatedSession] = []

    def open_session(path: Path, **limits: Any) -> IsolatedSession:
        session = IsolatedSession(path, "onnx", limits=IsolationLimits(**limits), clock=clock, jitter=lambda: 0.5)
        made.append(session)
        return session

    yield open_session
    for session in made:
        session.close()


def pid_of(session: IsolatedSession) -> int:
    assert session._child is not None
    return session._child._process.pid


def is_alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def gone(pid: int) -> bool:
    """Whether the process ends within 10 s."""
    ends = time.monotonic() + 10
    while is_alive(pid) and time.monotonic() < ends:
        threading.Event().wait(0.02)
    return not is_alive(pid)


def kill_between_runs(session: IsolatedSession) -> None:
    assert session._child is not None
    os.kill(pid_of(session), signal.SIGKILL)
    session._child._process.wait(10)


def in_a_hung_run(session: IsolatedSession) -> tuple[threading.Thread, list[EngineFailure]]:
    """A thread in a run that never ends, once the child works on it."""
    errors: list[EngineFailure] = []

    def run() -> None:
        with pytest.raises(EngineFailure) as caught:
            session.run({"x": np.ones(4, np.float32)}, ())
        errors.append(caught.value)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    while not session._running:
        threading.Event().wait(0.005)
    return thread, errors


# --- answers -------------------------------------------------------------------------------------------------------------


def test_it_answers_what_the_session_in_the_child_answers(opened: Open, tmp_path: Path) -> None:
    session = opened(write("onnx", SUM, tmp_path)[1])
    assert (session.inputs, session.outputs) == (SUM.inputs, SUM.outputs)
    inputs = SUM.example(rows=5)
    expected = SUM.compute(inputs)
    difference, total = session.run(inputs, ["difference", "sum"])
    assert np.array_equal(difference, expected["difference"])
    assert np.array_equal(total, expected["sum"])
    assert [array.tolist() for array in session.run(inputs, ())] == [
        expected["sum"].tolist(),
        expected["difference"].tolist(),
    ]
    total[:] = 0  # writable, and the caller's own
    assert np.array_equal(session.run(inputs, ["sum"])[0], expected["sum"])


@pytest.mark.parametrize(
    ("datatype", "array"),
    [
        ("BYTES", np.array([[b"a", b"", "é".encode()]], np.object_)),
        ("BOOL", np.array([[True, False]])),
        ("FP16", np.array([[np.inf, 1.5]], np.float16)),
        ("INT64", np.array([[np.iinfo(np.int64).min]])),
        ("FP32", np.zeros((0, 4), np.float32)),
        ("FP32", np.arange(8, dtype=np.float32).reshape(2, 4)[:, ::2]),
        ("FP32", np.array(3, np.float32)),
    ],
    ids=["text", "bool", "fp16", "int64", "empty", "strided", "scalar"],
)
def test_tensors_of_every_kind_cross_unchanged(datatype: str, array: Any) -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        send(ours, {"x": array, "y": array}, ["a", "b"])
        frame, arrays = receive(theirs)
    assert (frame.outputs, list(arrays)) == (("a", "b"), ["x", "y"])
    for got in arrays.values():
        assert (got.dtype, got.shape, got.tolist()) == (array.dtype, array.shape, array.tolist())


def test_threads_that_share_it_get_their_own_answers(opened: Open, onnx_model: OnnxWriter) -> None:
    session = opened(onnx_model("scale"))
    wrong: list[float] = []

    def ask(value: float) -> None:
        x = np.full((3, 4), value, np.float32)
        wrong.extend(value for _ in range(30) if session.run({"x": x}, ())[0][2, 3] != value * 2)

    threads = [threading.Thread(target=ask, args=(float(value),)) for value in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=20)
    assert wrong == []


def test_errors_of_the_session_stay_what_they_are_and_the_child_lives_on(opened: Open, onnx_model: OnnxWriter) -> None:
    texts = opened(onnx_model("identity", datatype="BYTES", shape=("n",)))
    with pytest.raises(InvalidRequest, match="element 0 is not UTF-8"):
        texts.run({"x": np.array([b"\xff"], np.object_)}, ())
    with pytest.raises(InvalidRequest, match="neither text nor bytes"):
        texts.run({"x": np.array([3], np.object_)}, ())
    scale = opened(onnx_model("scale"))
    child = pid_of(scale)
    with pytest.raises(EngineFailure, match="onnxruntime"):
        scale.run({"x": np.ones((1, 5), np.float32)}, ())
    with pytest.raises(EngineFailure, match="onnxruntime"):
        scale.run(X, ["wrong"])
    assert scale.run(X, ())[0].tolist() == [[2.0] * 4]
    assert pid_of(scale) == child


# --- stopping ------------------------------------------------------------------------------------------------------------


def test_a_hung_run_is_stopped_and_the_next_run_has_a_new_process(opened: Open, onnx_model: OnnxWriter) -> None:
    session = opened(onnx_model("endless"))
    first = pid_of(session)
    thread, errors = in_a_hung_run(session)
    assert session.stop()
    thread.join(timeout=10)
    assert str(errors[0]) == "the run was stopped"
    assert gone(first)
    thread, errors = in_a_hung_run(session)
    assert pid_of(session) != first
    session.stop()
    thread.join(timeout=10)
    assert str(errors[0]) == "the run was stopped"


def test_stopping_between_runs_ends_nothing(opened: Open, onnx_model: OnnxWriter) -> None:
    session = opened(onnx_model("scale"))
    child = pid_of(session)
    assert session.stop()
    assert session.run(X, ())[0].tolist() == [[2.0] * 4]
    assert pid_of(session) == child


def test_a_run_that_nobody_stops_ends_at_its_own_limit(opened: Open, onnx_model: OnnxWriter) -> None:
    session = opened(onnx_model("endless"), run_seconds=0.2)
    child = pid_of(session)
    with pytest.raises(EngineFailure, match=r"stopped after 0\.2 s"):
        session.run({"x": np.ones(4, np.float32)}, ())
    assert gone(child)


# --- deaths --------------------------------------------------------------------------------------------------------------


def test_a_child_that_dies_in_a_run_costs_that_run_alone(opened: Open, onnx_model: OnnxWriter) -> None:
    session = opened(onnx_model("endless"))
    thread, errors = in_a_hung_run(session)
    os.kill(pid_of(session), signal.SIGSEGV)
    thread.join(timeout=10)
    assert str(errors[0]) == "the model's process died (SIGSEGV)"


def test_a_child_that_died_between_runs_is_replaced_without_a_failure(opened: Open, onnx_model: OnnxWriter) -> None:
    session = opened(onnx_model("scale"))
    kill_between_runs(session)
    assert session.run(X, ())[0].tolist() == [[2.0] * 4]


def test_a_run_that_wants_too_much_memory_fails_there_and_not_here(opened: Open, tmp_path: Path) -> None:
    nodes = [Node("ConstantOfShape", ["shape"], ["big"]), Node("Add", ["x", "big"], ["y"])]
    x, y = Value("x", "FP32", ["n", 4]), Value("y", "FP32", ["n", 4])
    shape = np.array([3 << 26, 4], np.int64)
    session = opened(write_model(tmp_path / "huge.onnx", nodes, [x], [y], {"shape": shape}))
    with pytest.raises(EngineFailure):
        session.run(X, ())


def test_restarts_come_at_growing_intervals_until_it_has_been_quiet(clock: Clock) -> None:
    backoff = Backoff(clock, jitter=lambda: 0.5)
    waits = []
    for _ in range(9):
        backoff.died()
        waits.append(backoff.left())
        clock.now += backoff.left()
    assert waits == [0, 0.5, 1, 2, 4, 8, 16, 30, 30]
    clock.now += isolated.QUIET_SECONDS + 1
    backoff.died()
    assert backoff.left() == 0


def test_the_interval_is_spread_by_half_to_either_side(clock: Clock) -> None:
    spread = [0.0, 1.0]
    for low, wait in zip(spread, (0.25, 0.75), strict=True):
        backoff = Backoff(clock, jitter=lambda low=low: low)
        backoff.died()
        backoff.died()
        assert backoff.left() == wait


def test_between_two_starts_runs_are_refused_for_now(opened: Open, onnx_model: OnnxWriter, clock: Clock) -> None:
    session = opened(onnx_model("scale"))
    kill_between_runs(session)
    session.run(X, ())
    kill_between_runs(session)
    with pytest.raises(NotReady, match=r"started again in 0\.5 s"):
        session.run(X, ())
    clock.now += 0.5
    assert session.run(X, ())[0].tolist() == [[2.0] * 4]


def test_a_file_that_changed_meanwhile_is_not_served_under_the_old_interface(
    opened: Open, onnx_model: OnnxWriter, tmp_path: Path
) -> None:
    path = onnx_model("scale")
    session = opened(path)
    onnx_model("scale", path, width=5)
    kill_between_runs(session)
    with pytest.raises(EngineFailure, match="file has changed"):
        session.run(X, ())


def test_closing_ends_the_process_and_a_run_afterwards_is_refused(opened: Open, onnx_model: OnnxWriter) -> None:
    session = opened(onnx_model("scale"))
    child = pid_of(session)
    session.close()
    session.close()
    assert gone(child)
    with pytest.raises(EngineFailure, match="closed"):
        session.run(X, ())


HOLDER = """
import sys, threading
from pathlib import Path
import numpy as np
from models.serving.isolated import IsolatedSession
made = []
def start():
    made.append(IsolatedSession(Path(sys.argv[1]), "onnx"))
thread = threading.Thread(target=start); thread.start(); thread.join()
threading.Thread(target=lambda: made[0].run({"x": np.ones(4, np.float32)}, ()), daemon=True).start()
print(made[0]._child._process.pid, flush=True)
sys.stdin.read()
"""


def test_the_child_goes_with_its_parent_also_from_the_midst_of_a_run(onnx_model: OnnxWriter) -> None:
    parent = subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(onnx_model("endless"))],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, cwd=Path(isolated.__file__).parents[2],
    )  # fmt: skip
    try:
        assert parent.stdout is not None
        child = int(parent.stdout.readline())
        # The thread that started the child has ended long since: it must not go with that.
        assert is_alive(child)
    finally:
        parent.kill()
        parent.communicate(timeout=10)
    assert gone(child)


# --- starting ------------------------------------------------------------------------------------------------------------


def test_a_file_that_the_engine_refuses_is_a_breach(tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    path.write_bytes(b"garbage")
    with pytest.raises(ContractBreach, match="onnxruntime refuses"):
        IsolatedSession(path, "onnx")


def test_an_engine_that_is_none_is_a_breach(onnx_model: OnnxWriter) -> None:
    with pytest.raises(ContractBreach, match="'tpu' is none of"):
        IsolatedSession(onnx_model("scale"), "tpu", EngineOptions())


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("exit 3", r"was not loaded: the model's process died \(status 3\)"),
        ("kill -SEGV $$", r"was not loaded: the model's process died \(SIGSEGV\)"),
        ("sleep 30", "was not loaded within 0.3 s"),
    ],
)
def test_a_process_that_does_not_get_as_far_says_how_it_ended(
    onnx_model: OnnxWriter, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str, reason: str
) -> None:
    script = tmp_path / "child.sh"
    script.write_text(f"#!/bin/sh\nexec 1>&2\n{text}\n")
    script.chmod(0o700)
    monkeypatch.setattr("models.serving.isolated.sys.executable", str(script))
    with pytest.raises(NotReady, match=reason):
        IsolatedSession(onnx_model("scale"), "onnx", limits=IsolationLimits(start_seconds=0.3))


def test_a_process_that_cannot_be_started_says_nothing_about_the_file(
    onnx_model: OnnxWriter, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("models.serving.isolated.sys.executable", str(tmp_path / "missing"))
    with pytest.raises(NotReady, match="no process could be started"):
        IsolatedSession(onnx_model("scale"), "onnx")


# --- frames from a child that was taken over -----------------------------------------------------------------------------


def frame_of(*tensors: tuple[str, str, tuple[int, ...], int]) -> bytes:
    header = isolated_wire._ENCODER.encode(
        isolated_wire.Frame(tuple(isolated_wire.Tensor(*tensor) for tensor in tensors))
    )
    return len(header).to_bytes(4, "little") + header


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\x01",
        b"\xff\xff\xff\xff",
        b"\x03\x00\x00\x00abc",
        frame_of(("y", "FP32", (4,), 15)),
        frame_of(("y", "FP32", (-1,), 4)),
        frame_of(("y", "FP32", (1 << 40,), 4)),
        frame_of(("y", "FP32", (1 << 28,), 1 << 31)),
        frame_of(("y", "FP32", (1,), -4)),
        frame_of(("y", "COMPLEX", (1,), 4)),
        frame_of(("y", "BYTES", (9,), 4)) + b"\0\0\0\0",
        frame_of(("y", "FP32", (2,), 8)) + b"1234",
    ],
)
def test_what_is_no_frame_breaks_the_stream_and_costs_no_memory(data: bytes) -> None:
    ours, theirs = socket.socketpair()
    with theirs:
        with ours:
            ours.sendall(data)
        with pytest.raises(BrokenFrame):
            receive(theirs)
