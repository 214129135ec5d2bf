from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from models.engines import EngineOptions
from models.errors import ContractBreach, EngineFailure, NoUsableVariant
from models.zoo.digits import held_out, package_folder

litert = pytest.importorskip("models.engines.litert", exc_type=ImportError)
MODEL = package_folder("device", "1") / "model.tflite"


@pytest.fixture
def session() -> Any:
    return litert.LitertEngine().load(MODEL, EngineOptions())


def test_names_are_clean_and_free_sizes_are_minus_one(session: Any) -> None:
    assert [(spec.name, spec.datatype, spec.shape) for spec in session.inputs] == [("image", "FP32", (-1, 64))]
    assert [(spec.name, spec.datatype, spec.shape) for spec in session.outputs] == [("probabilities", "FP32", (-1, 10))]


def test_every_batch_size_gives_each_row_its_own_answer(session: Any) -> None:
    images = held_out()[0][:5]
    (whole,) = session.run({"image": images}, ())
    for size in (1, 3, 1, 5):
        (part,) = session.run({"image": images[:size]}, ["probabilities"])
        assert np.array_equal(part, whole[:size])


def test_outputs_belong_to_the_caller(session: Any) -> None:
    images = held_out()[0]
    (first,) = session.run({"image": images[:1]}, ())
    before = first.copy()
    session.run({"image": images[1:2]}, ())
    assert np.array_equal(first, before)


def test_threads_that_share_a_session_get_their_own_answers(session: Any) -> None:
    images = held_out()[0][:8]
    expected = [session.run({"image": images[row : row + 1]}, ())[0] for row in range(8)]
    wrong: list[int] = []

    def ask(row: int) -> None:
        for _ in range(50):
            if not np.array_equal(session.run({"image": images[row : row + 1]}, ())[0], expected[row]):
                wrong.append(row)

    threads = [threading.Thread(target=ask, args=(row,)) for row in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=20)
    assert wrong == []


def test_a_run_waits_for_the_one_before_it(session: Any) -> None:
    real, inside, overlapped = session._interpreter, threading.Semaphore(1), threading.Event()

    class Watched:
        def __getattr__(self, name: str) -> Any:
            return getattr(real, name)

        def set_tensor(self, index: int, value: Any) -> None:
            if not inside.acquire(blocking=False):
                overlapped.set()
            overlapped.wait(0.05)  # time for another thread to come in, were it let
            real.set_tensor(index, value)

        def get_tensor(self, index: int) -> Any:
            inside.release()
            return real.get_tensor(index)

    session._interpreter = Watched()
    image = {"image": held_out()[0][:1]}
    threads = [threading.Thread(target=session.run, args=(image, ())) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=10)
    assert not overlapped.is_set()


def test_a_failing_run_is_an_engine_failure_and_the_session_lives_on(session: Any) -> None:
    session.run({"image": np.ones((2, 64), np.float32)}, ())
    with pytest.raises(EngineFailure, match="LiteRT"):
        session.run({"image": np.ones((2, 63), np.float32)}, ())
    assert session.run({"image": np.ones((2, 64), np.float32)}, ())[0].shape == (2, 10)


@pytest.mark.parametrize("damage", [b"garbage" * 100, b"", MODEL.read_bytes()[:3000]])
def test_a_damaged_file_is_a_breach(tmp_path: Path, damage: bytes) -> None:
    path = tmp_path / "model.tflite"
    path.write_bytes(damage)
    with pytest.raises(ContractBreach, match="LiteRT refuses"):
        litert.LitertEngine().load(path, EngineOptions())


def test_tflite_runtime_beside_numpy_2_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(**_: object) -> None:
        raise SystemError("initialization of _pywrap_tensorflow_interpreter_wrapper raised unreported exception")

    monkeypatch.setattr(litert, "Interpreter", broken)
    with pytest.raises(NoUsableVariant, match="ai-edge-litert, or numpy < 2"):
        litert.LitertEngine().load(MODEL, EngineOptions())


@pytest.mark.parametrize(
    ("name", "clean"),
    [("serving_default_x:0", "x"), ("x", "x"), ("StatefulPartitionedCall:1", "StatefulPartitionedCall")],
)
def test_what_converters_add_to_a_name_is_stripped(name: str, clean: str) -> None:
    assert litert.clean_name(name) == clean


def test_closing_twice_is_harmless_and_a_run_afterwards_is_refused(session: Any) -> None:
    session.close()
    session.close()
    with pytest.raises(EngineFailure):
        session.run({"image": np.ones((1, 64), np.float32)}, ())
