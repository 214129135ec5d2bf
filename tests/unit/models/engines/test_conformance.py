"""Every engine over every tiny model: one contract, whatever runs the file."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tiny_models import CONVOLUTION, DEEP, DENSE, FORMATS, SCALAR, SCALE, SUM, TINY, Tiny, identity, write

from models.engines import Session, get_engine
from models.errors import EngineFailure, InvalidRequest
from models.tensor import DTYPES

DATATYPES = {
    "onnx": list(DTYPES),
    "tflite": [name for name in DTYPES if name != "BYTES"],
    "torchscript": [name for name in DTYPES if name != "BYTES"],
    "export": [name for name in DTYPES if name != "BYTES"],
}
pytestmark = pytest.mark.filterwarnings("ignore:.torch.jit:DeprecationWarning")
Load = Callable[[str, Tiny], Session]


@pytest.fixture(scope="module")
def load(tmp_path_factory: pytest.TempPathFactory) -> Load:
    """Each file is written and loaded once: making a torch.export program takes a while."""
    loaded: dict[tuple[str, str], Session] = {}

    def get(form: str, tiny: Tiny) -> Session:
        key = form, f"{tiny.name}-{tiny.inputs}"
        if key not in loaded:
            engine, path, options = write(form, tiny, tmp_path_factory.mktemp(f"{form}-{tiny.name}"))
            loaded[key] = get_engine(engine).load(path, options)
        return loaded[key]

    return get


def fresh(form: str, tiny: Tiny, folder: Path) -> Session:
    engine, path, options = write(form, tiny, folder)
    return get_engine(engine).load(path, options)


def same(tiny: Tiny, got: Any, expected: Any) -> bool:
    """Bit for bit, or within what the order of a sum may change."""
    if got.dtype != expected.dtype or got.shape != expected.shape:
        return False
    if tiny.tolerance:
        return bool(np.abs(got - expected).max() <= tiny.tolerance)
    return bool(np.array_equal(got, expected))


every_format = pytest.mark.parametrize("form", FORMATS)
every_model = pytest.mark.parametrize("tiny", TINY, ids=lambda tiny: f"{tiny.name}-{len(tiny.inputs[0].shape)}d")


@every_format
@every_model
def test_a_session_states_the_models_names_datatypes_and_shapes(load: Load, form: str, tiny: Tiny) -> None:
    session = load(form, tiny)
    assert tuple(session.inputs) == tiny.inputs
    assert {spec.name: spec.datatype for spec in session.outputs} == {spec.name: spec.datatype for spec in tiny.outputs}


@every_format
@every_model
@pytest.mark.parametrize("rows", [1, 2, 7])
def test_answers_are_those_of_numpy_for_every_batch_size(load: Load, form: str, tiny: Tiny, rows: int) -> None:
    inputs = tiny.example(rows, seed=rows)
    names = [spec.name for spec in tiny.outputs]
    expected = tiny.compute(inputs)
    for name, answer in zip(names, load(form, tiny).run(inputs, names), strict=True):
        assert same(tiny, answer, expected[name]), (name, answer, expected[name])


@pytest.mark.parametrize(("form", "datatype"), [(form, name) for form, names in DATATYPES.items() for name in names])
def test_every_datatype_passes_through_bit_for_bit(load: Load, form: str, datatype: str) -> None:
    tiny = identity(datatype)
    x = tiny.example()
    if datatype.startswith(("INT", "UINT")):
        limits = np.iinfo(DTYPES[datatype])
        x["x"][0, :2] = limits.min, limits.max
    (y,) = load(form, tiny).run(x, ())
    assert (y.dtype, y.shape) == (x["x"].dtype, x["x"].shape)
    assert y.tolist() == x["x"].tolist()


@every_format
def test_not_a_number_and_the_infinities_pass_through(load: Load, form: str) -> None:
    x = np.array([[np.nan, np.inf, -np.inf, -0.0]], np.float32)
    (y,) = load(form, identity()).run({"x": x}, ())
    assert y.tobytes() == x.tobytes()


@every_format
@pytest.mark.parametrize("names", [("difference", "sum"), ("difference",), ("sum",), ("sum", "difference")])
def test_outputs_come_as_asked_for_in_that_order(load: Load, form: str, names: tuple[str, ...]) -> None:
    inputs = SUM.example()
    expected = SUM.compute(inputs)
    answers = load(form, SUM).run(inputs, names)
    assert [answer.tolist() for answer in answers] == [expected[name].tolist() for name in names]


@every_format
def test_all_outputs_come_in_the_sessions_order_when_none_is_named(load: Load, form: str) -> None:
    inputs, session = SUM.example(), load(form, SUM)
    expected = SUM.compute(inputs)
    answers = session.run(inputs, ())
    assert [answer.tolist() for answer in answers] == [expected[spec.name].tolist() for spec in session.outputs]


@every_format
def test_the_order_of_the_inputs_given_does_not_matter(load: Load, form: str) -> None:
    inputs = SUM.example()
    (answer,) = load(form, SUM).run(dict(reversed(inputs.items())), ["difference"])
    assert answer.tolist() == (inputs["a"] - inputs["b"]).tolist()


@every_format
@pytest.mark.parametrize("tiny", [SCALE, SCALAR, DEEP, CONVOLUTION], ids=lambda tiny: tiny.name)
def test_arrays_belong_to_the_caller_on_both_sides(load: Load, form: str, tiny: Tiny) -> None:
    session, inputs = load(form, tiny), tiny.example()
    before = {name: array.copy() for name, array in inputs.items()}
    (first,) = session.run(inputs, ())
    kept = first.copy()
    assert all(np.array_equal(inputs[name], before[name]) for name in inputs)
    assert not any(np.shares_memory(first, array) for array in inputs.values())
    (second,) = session.run({name: np.asarray(array + 1) for name, array in inputs.items()}, ())
    assert np.array_equal(first, kept)
    first[...] = 99
    (again,) = session.run(inputs, ())
    assert np.array_equal(again, kept)
    assert not np.shares_memory(again, second)


@every_format
def test_a_read_only_unaligned_view_of_a_request_is_accepted(load: Load, form: str) -> None:
    body = b"{" + np.arange(4, dtype=np.float32).tobytes()
    (y,) = load(form, SCALE).run({"x": np.frombuffer(body, np.float32, offset=1).reshape(1, 4)}, ())
    assert y.tolist() == [[0, 2.5, 5, 7.5]]


@every_format
def test_arrays_that_are_not_contiguous_are_accepted(load: Load, form: str) -> None:
    x = np.arange(24, dtype=np.float32).reshape(3, 8)[:, ::2]
    (y,) = load(form, SCALE).run({"x": x}, ())
    assert y.tolist() == (x * 2.5).tolist()


@every_format
def test_four_threads_that_share_a_session_get_their_own_answers(load: Load, form: str) -> None:
    session = load(form, DENSE)
    wrong: list[object] = []

    def ask(seed: int) -> None:
        inputs = DENSE.example(1 + seed, seed)
        expected = DENSE.compute(inputs)["y"]
        try:
            wrong.extend(seed for _ in range(50) if not same(DENSE, session.run(inputs, ())[0], expected))
        except Exception as error:  # noqa: BLE001 - told by the assertion below
            wrong.append(error)

    threads = [threading.Thread(target=ask, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=20)
    assert wrong == []


@every_format
@pytest.mark.parametrize(
    "change",
    [
        lambda inputs: {"x": inputs["x"][:, :5]},
        lambda inputs: {},
        lambda inputs: {"wrong": inputs["x"]},
        lambda inputs: {"x": inputs["x"].astype(np.float64)},
    ],
    ids=["too narrow", "nothing", "another name", "another datatype"],
)
def test_inputs_that_do_not_fit_are_refused_and_the_session_lives_on(
    load: Load, form: str, change: Callable[[Any], Any]
) -> None:
    session, inputs = load(form, DENSE), DENSE.example()
    with pytest.raises((EngineFailure, InvalidRequest)) as caught:
        session.run(change(inputs), ())
    assert "\n" not in str(caught.value)
    assert same(DENSE, session.run(inputs, ())[0], DENSE.compute(inputs)["y"])


@every_format
def test_an_output_that_is_unknown_is_refused(load: Load, form: str) -> None:
    with pytest.raises(EngineFailure):
        load(form, SCALE).run(SCALE.example(), ["wrong"])


@every_format
def test_stopping_an_idle_session_does_not_concern_later_runs(load: Load, form: str) -> None:
    session = load(form, SCALE)
    assert session.stop() is (form == "onnx")
    assert session.run(SCALE.example(), ())[0].shape == (3, 4)


@every_format
def test_closing_twice_is_harmless_and_a_run_afterwards_is_refused(tmp_path: Path, form: str) -> None:
    session = fresh(form, SCALE, tmp_path)
    session.close()
    session.close()
    with pytest.raises(EngineFailure):
        session.run(SCALE.example(), ())
