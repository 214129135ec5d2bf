from __future__ import annotations

import threading
from pathlib import Path

import numpy as np
import onnxruntime
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


def test_runs_that_never_end_are_stopped_and_the_session_lives_on(onnx_model: OnnxWriter) -> None:
    session = load(onnx_model("endless"))
    errors: list[str] = []

    def run() -> None:
        with pytest.raises(EngineFailure) as caught:
            session.run({"x": np.ones(4, np.float32)}, ())
        errors.append(str(caught.value))

    threads = [threading.Thread(target=run, daemon=True) for _ in range(2)]
    for thread in threads:
        thread.start()
    while any(thread.is_alive() for thread in threads):
        assert session.stop()  # again, for a run that had not begun
        threads[0].join(0.02)
    assert errors == ["onnxruntime: the run was stopped"] * 2
    with pytest.raises(EngineFailure, match=r"^onnxruntime: .*dimension"):
        session.run({"x": np.ones(5, np.float32)}, ())


def test_stopping_one_session_does_not_stop_another(onnx_model: OnnxWriter) -> None:
    first, second = load(onnx_model("scale")), load(onnx_model("scale"))
    flags = second._flags
    first.stop()
    assert not flags.terminate
    assert first.run({"x": np.ones((1, 4), np.float32)}, ())[0].tolist() == [[2.0] * 4]


def test_a_release_without_the_session_beneath_is_asked_through_the_public_one(onnx_model: OnnxWriter) -> None:
    class Public:
        def __init__(self, path: Path) -> None:
            self._inner = onnxruntime.InferenceSession(str(path))
            self.get_inputs, self.get_outputs, self.run = (
                self._inner.get_inputs,
                self._inner.get_outputs,
                self._inner.run,
            )

    session = OnnxSession(Public(onnx_model("scale")))
    assert session.run({"x": np.ones((1, 4), np.float32)}, ())[0].tolist() == [[2.0] * 4]
    with pytest.raises(EngineFailure, match="0 inputs given, the model takes 1"):
        session.run({}, ())


def test_the_session_beneath_answers_what_the_public_one_does(onnx_model: OnnxWriter) -> None:
    path = onnx_model("mlp")
    public, session = onnxruntime.InferenceSession(str(path)), load(path)
    assert session._run.__self__ is not public
    assert session._run.__self__.__class__ is public._sess.__class__
    x = np.random.default_rng(1).standard_normal((5, 64)).astype(np.float32)
    assert session.run({"x": x}, ())[0].tobytes() == public.run(None, {"x": x})[0].tobytes()


def test_a_tensor_that_the_protocol_cannot_carry_is_a_breach_naming_it(tmp_path: Path) -> None:
    x, y = Value("x", "FP32", ["n"]), Value("y", "FP32", ["n"])
    path = write_model(tmp_path / "m.onnx", [Node("SequenceConstruct", ["x"], ["y"])], [x], [y])
    path.write_bytes(sequence_output(path.read_bytes()))
    with pytest.raises(
        ContractBreach, match=r"'y' is a seq\(tensor\(float\)\), which the Open Inference Protocol cannot carry"
    ):
        load(path)


def sequence_output(model: bytes) -> bytes:
    """The same model whose output `y`, a tensor of floats in the file, is typed as a sequence of them."""
    tensor = b"\x0a\x09\x08\x01\x12\x05\x0a\x03\x12\x01n"
    old = b"\x62\x10\x0a\x01y\x12\x0b" + tensor
    assert old in model
    sequence = b"\x22\x0d\x0a\x0b" + tensor
    new = b"\x62\x14\x0a\x01y\x12\x0f" + sequence
    return grown(model.replace(old, new), 4)


def grown(model: bytes, by: int) -> bytes:
    """The model with the length of its graph, one byte at offset 3, raised."""
    assert model[2] == 0x3A
    return model[:3] + bytes([model[3] + by]) + model[4:]
