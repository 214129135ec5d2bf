from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from onnx_writer import ELEMENT_TYPES, Node, OnnxWriter, Value, write_model

from models.engines import EngineOptions
from models.engines.onnx import OnnxEngine, OnnxSession
from models.errors import ContractBreach, EngineFailure, InvalidRequest
from models.tensor import DTYPES, TensorSpec


def load(path: Path) -> OnnxSession:
    return OnnxEngine().load(path, EngineOptions())


@pytest.mark.parametrize("datatype", sorted(ELEMENT_TYPES))
def test_every_datatype_round_trips_bit_for_bit(onnx_model: OnnxWriter, datatype: str) -> None:
    session = load(onnx_model("identity", datatype=datatype))
    if datatype == "BYTES":
        x = np.array([[b"a", b"", "\u00e9".encode(), b"four"]], dtype=np.object_)
    else:
        x = np.array([[0, 1, 1, 0]]).astype(DTYPES[datatype])
    (y,) = session.run({"x": x}, ["y"])
    assert session.inputs == (TensorSpec("x", datatype, (-1, 4)),)
    assert session.outputs == (TensorSpec("y", datatype, (-1, 4)),)
    assert y.dtype == x.dtype
    assert y.tolist() == x.tolist()


def test_outputs_come_in_the_order_asked_for_and_all_when_none_is_named(onnx_model: OnnxWriter) -> None:
    session = load(onnx_model("sum"))
    a, b = np.full((1, 4), 5, np.float32), np.full((1, 4), 3, np.float32)
    difference, total = session.run({"a": a, "b": b}, ["difference", "sum"])
    assert (difference[0, 0], total[0, 0]) == (2, 8)
    assert [array[0, 0] for array in session.run({"a": a, "b": b}, ())] == [8, 2]


def test_outputs_belong_to_the_caller(onnx_model: OnnxWriter) -> None:
    session = load(onnx_model("identity"))
    x = np.ones((2, 4), np.float32)
    (first,) = session.run({"x": x}, ())
    x[:] = 7
    session.run({"x": x}, ())
    assert first.tolist() == [[1.0] * 4] * 2
    session.close()
    assert first.tolist() == [[1.0] * 4] * 2


def test_an_output_that_is_an_input_does_not_alias_the_callers_memory(tmp_path: Path) -> None:
    x, y = Value("x", "FP32", ["n", 2]), Value("y", "FP32", ["n", 2])
    session = load(write_model(tmp_path / "m.onnx", [Node("Identity", ["x"], ["y"])], [x], [y, x]))
    array = np.ones((1, 2), np.float32)
    assert not any(np.shares_memory(array, output) for output in session.run({"x": array}, ()))


def test_an_unaligned_read_only_view_of_a_request_body_is_accepted(onnx_model: OnnxWriter) -> None:
    session = load(onnx_model("scale", factor=2.0))
    body = b"{" + np.arange(4, dtype=np.float32).tobytes()
    (y,) = session.run({"x": np.frombuffer(body, np.float32, offset=1).reshape(1, 4)}, ())
    assert y.tolist() == [[0, 2, 4, 6]]


def test_text_that_is_not_utf8_is_the_callers_fault(onnx_model: OnnxWriter) -> None:
    session = load(onnx_model("identity", datatype="BYTES", shape=("n",)))
    for item in (b"\xff", "\ud800"):
        with pytest.raises(InvalidRequest, match=r"input 'x'.*element 0 is not UTF-8"):
            session.run({"x": np.array([item], dtype=np.object_)}, ())


@pytest.mark.parametrize("damage", [b"garbage", b"", None])
def test_a_damaged_file_is_a_breach_without_machine_paths(onnx_model: OnnxWriter, damage: bytes | None) -> None:
    path = onnx_model("mlp")
    path.write_bytes(path.read_bytes()[:900] if damage is None else damage)
    with pytest.raises(ContractBreach, match="onnxruntime refuses") as caught:
        load(path)
    assert str(path.parent) not in str(caught.value)


def test_a_failing_run_is_an_engine_failure_and_the_session_lives_on(onnx_model: OnnxWriter) -> None:
    session = load(onnx_model("scale"))
    with pytest.raises(EngineFailure, match="onnxruntime"):
        session.run({"x": np.ones((1, 5), np.float32)}, ())
    assert session.run({"x": np.ones((1, 4), np.float32)}, ())[0].shape == (1, 4)


def test_closing_twice_is_harmless_and_a_run_afterwards_is_refused(onnx_model: OnnxWriter) -> None:
    session = load(onnx_model("scale"))
    session.close()
    session.close()
    with pytest.raises(EngineFailure, match="closed"):
        session.run({"x": np.ones((1, 4), np.float32)}, ())


@pytest.mark.parametrize(
    ("item", "kind"), [(10**12, "int"), (-1, "int"), (None, "NoneType"), (1.5, "float"), (["a"], "list")]
)
def test_a_text_element_that_is_neither_bytes_nor_text_is_refused_by_its_index(
    onnx_model: OnnxWriter, item: object, kind: str
) -> None:
    session = load(onnx_model("identity", datatype="BYTES", shape=("n",)))
    array = np.array([b"a", None], dtype=np.object_)
    array[1] = item
    with pytest.raises(InvalidRequest, match=f"input 'x': element 1 is a {kind}, expected bytes or text"):
        session.run({"x": array}, ())


def test_text_may_be_any_kind_of_bytes_or_a_str(onnx_model: OnnxWriter) -> None:
    session = load(onnx_model("identity", datatype="BYTES", shape=("n",)))
    array = np.array([b"a", bytearray(b"b"), memoryview(b"c"), "d"], dtype=np.object_)
    assert session.run({"x": array}, ())[0].tolist() == [b"a", b"b", b"c", b"d"]


def test_a_failing_run_says_so_on_one_line(onnx_model: OnnxWriter) -> None:
    def fail(*_: object) -> None:
        raise RuntimeError("first\nsecond")

    session = load(onnx_model("scale"))
    session._run = fail
    with pytest.raises(EngineFailure, match=r"^onnxruntime: first$"):
        session.run({"x": np.ones((1, 4), np.float32)}, ())
