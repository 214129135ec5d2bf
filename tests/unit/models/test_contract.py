from __future__ import annotations

import io
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from onnx_writer import Node, OnnxWriter, Value, write_model
from package_writer import scale_package, write_package

from models import contract
from models.contract import bind, check_golden, is_finite, load_golden
from models.engines import EngineOptions
from models.engines.onnx import OnnxEngine
from models.errors import ContractBreach
from models.manifest import Confidence
from models.tensor import TensorSpec

X = np.ones((2, 4), np.float32)


def spec(name: str, datatype: str = "FP32", shape: tuple[int, ...] = (-1, 4)) -> TensorSpec:
    return TensorSpec(name, datatype, shape)


def test_a_package_that_keeps_its_promise_passes(tmp_path: Path) -> None:
    package = scale_package(tmp_path, 2.0)
    session = OnnxEngine().load(package.model, EngineOptions())
    bound = bind(session, package.manifest.inputs, package.manifest.outputs)
    assert bound is session
    check_golden(bound, package.manifest, load_golden(package.golden, package.manifest), 1e-6)


@pytest.mark.parametrize(
    ("outputs", "tolerance", "reason"),
    [
        (X * 2 + 0.5, 0.1, "differs from the golden output by 0.5, allowed is 0.1"),
        (X[:1] * 2, 0.1, r"golden is \[1, 4\]"),
        (X * np.nan, 1e6, "differs"),
    ],
)
def test_a_wrong_golden_output_is_a_breach(tmp_path: Path, outputs: Any, tolerance: float, reason: str) -> None:
    model = scale_package(tmp_path, 2.0).model
    package = write_package(model, {"x": X}, {"y": outputs})
    session = OnnxEngine().load(model, EngineOptions())
    with pytest.raises(ContractBreach, match=f"output 'y'.*{reason}"):
        check_golden(session, package.manifest, load_golden(package.golden, package.manifest), tolerance)


def test_an_answer_that_is_not_finite_is_a_breach(onnx_model: OnnxWriter) -> None:
    model = onnx_model("nan")
    package = write_package(model, {"x": -X}, {"y": X})
    session = OnnxEngine().load(model, EngineOptions())
    with pytest.raises(ContractBreach, match="not finite"):
        check_golden(session, package.manifest, load_golden(package.golden, package.manifest), 1.0)


def test_a_difference_of_unsigned_integers_does_not_wrap(onnx_model: OnnxWriter) -> None:
    model = onnx_model("identity", datatype="UINT8")
    ones = np.ones((1, 4), np.uint8)
    package = write_package(model, {"x": ones}, {"y": ones + np.uint8(1)})
    session = OnnxEngine().load(model, EngineOptions())
    golden = load_golden(package.golden, package.manifest)
    check_golden(session, package.manifest, golden, 1.0)
    with pytest.raises(ContractBreach, match="by 1"):
        check_golden(session, package.manifest, golden, 0.5)


def test_text_is_compared_exactly(onnx_model: OnnxWriter) -> None:
    model = onnx_model("identity", datatype="BYTES")
    text = np.array([[b"a", b"bc", b"", b"d"]])
    package = write_package(model, {"x": text}, {"y": text})
    session = OnnxEngine().load(model, EngineOptions())
    golden = load_golden(package.golden, package.manifest)
    check_golden(session, package.manifest, golden, 0.0)
    golden.outputs["y"][0, 0] = b"b"
    with pytest.raises(ContractBreach, match="differs"):
        check_golden(session, package.manifest, golden, 0.0)


@pytest.mark.parametrize(
    ("inputs", "outputs", "reason"),
    [
        ([spec("x", "INT8")], [spec("y")], "input 'x': the file has FP32, promised is INT8"),
        ([spec("x", shape=(-1, 5))], [spec("y")], r"input 'x': the file takes \[-1, 4\], promised is \[-1, 5\]"),
        ([spec("x", shape=(-1, -1))], [spec("y")], "input 'x': the file takes"),
        ([spec("x", shape=(4,))], [spec("y")], "input 'x': the file takes"),
        ([spec("x"), spec("z")], [spec("y")], "the file's inputs are x; promised are x, z"),
        ([spec("x")], [spec("y"), spec("z")], "the file's outputs are y; promised are y, z"),
        ([spec("x")], [spec("y", "FP64")], "output 'y': the file has FP32, promised is FP64"),
    ],
)
def test_an_interface_that_is_not_the_promised_one_is_a_breach(
    onnx_model: OnnxWriter, inputs: list[TensorSpec], outputs: list[TensorSpec], reason: str
) -> None:
    session = OnnxEngine().load(onnx_model("scale"), EngineOptions())
    with pytest.raises(ContractBreach, match=reason):
        bind(session, inputs, outputs)


def test_a_fixed_size_may_be_promised_where_the_file_takes_any(onnx_model: OnnxWriter) -> None:
    session = OnnxEngine().load(onnx_model("scale"), EngineOptions())
    assert bind(session, [spec("x", shape=(1, 4))], [spec("y")]) is session


def test_the_one_name_left_over_is_mapped(tmp_path: Path) -> None:
    values = {name: Value(name, "FP32", ["n", 4]) for name in ("a", "mangled:0", "y")}
    nodes = [Node("Sub", ["a", "mangled:0"], ["y"])]
    model = write_model(tmp_path / "m.onnx", nodes, [values["a"], values["mangled:0"]], [values["y"]])
    session = bind(OnnxEngine().load(model, EngineOptions()), [spec("b"), spec("a")], [spec("difference")])
    for wanted in ((), ["difference"]):
        assert session.run({"a": X * 5, "b": X * 3}, wanted)[0].tolist() == (X * 2).tolist()


def test_two_names_left_over_are_not_guessed(onnx_model: OnnxWriter) -> None:
    session = OnnxEngine().load(onnx_model("sum"), EngineOptions())
    with pytest.raises(ContractBreach, match="the file's inputs are a, b; promised are p, q"):
        bind(session, [spec("p"), spec("q")], [spec("sum"), spec("difference")])


def npz(**arrays: Any) -> bytes:
    file = io.BytesIO()
    np.savez(file, **arrays)
    return file.getvalue()


def damaged_deflate() -> bytes:
    """The first array's compressed bytes, after its 30-byte local header, name and extra field, do not unpack."""
    file = io.BytesIO()
    np.savez_compressed(file, **{"in.x": X, "out.y": X})
    data = bytearray(file.getvalue())
    start = 30 + int.from_bytes(data[26:28], "little") + int.from_bytes(data[28:30], "little")
    data[start : start + 2] = b"\xff\xff"
    return bytes(data)


def flagged(flag: int, method: int) -> bytes:
    """A .npz whose directory and first member claim this flag and compression method."""
    data = bytearray(npz(**{"in.x": X, "out.y": X}))
    for start in (0, data.index(b"PK\x01\x02") + 2):
        data[start + 6] = flag
        data[start + 8] = method
    return bytes(data)


def no_array() -> bytes:
    """A member that is not a .npy: numpy hands out its bytes."""
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("in.x", b"text")
    return file.getvalue()


def huge_header() -> bytes:
    """A .npy that claims 2^46 bytes and holds none."""
    header = b"{'descr': '<f4', 'fortran_order': False, 'shape': (17592186044416, 4), }".ljust(117) + b"\n"
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("in.x.npy", b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header)
    return file.getvalue()


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"not a zip", "cannot be read"),
        (b"", "cannot be read"),
        (npz(**{"in.x": X, "out.y": X})[:-40], "cannot be read"),
        (huge_header(), "cannot be read"),
        (damaged_deflate(), "cannot be read"),
        (flagged(1, 0), "cannot be read.*encrypted"),
        (flagged(0, 97), "cannot be read.*compression"),
        (no_array(), "cannot be read"),
        (npz(**{"in.x": np.array([object()]), "out.y": X}), "cannot be read"),
        (npz(**{"in.x": X}), r"'out\.\*' arrays are none; the manifest says y"),
        (npz(**{"in.x": X, "in.z": X, "out.y": X}), r"'in\.\*' arrays are x, z"),
        (npz(**{"in.x": X.astype(np.float64), "out.y": X}), "golden input 'x': expected datatype FP32, got FP64"),
        (npz(**{"in.x": X[:, :3], "out.y": X}), "golden input 'x': expected shape"),
    ],
    ids=[
        "text",
        "empty",
        "cut",
        "huge",
        "deflate",
        "encrypted",
        "method",
        "no array",
        "pickle",
        "no output",
        "extra",
        "dtype",
        "shape",
    ],
)
def test_a_golden_file_that_cannot_be_used_is_a_breach(tmp_path: Path, data: bytes, reason: str) -> None:
    package = scale_package(tmp_path, 2.0)
    package.golden.write_bytes(data)
    with pytest.raises(ContractBreach, match=reason):
        load_golden(package.golden, package.manifest)


def test_a_golden_file_that_unpacks_beyond_the_limit_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    package = scale_package(tmp_path, 2.0)
    monkeypatch.setattr(contract, "MAX_GOLDEN_BYTES", 100)
    with pytest.raises(ContractBreach, match="at most 100"):
        load_golden(package.golden, package.manifest)


@pytest.mark.parametrize(
    ("array", "finite"),
    [
        (np.array([1.0]), True),
        (np.array([np.inf], np.float16), False),
        (np.array([np.nan], np.float32), False),
        (np.array([1], np.int64), True),
        (np.array([b"nan"], np.object_), True),
    ],
)
def test_only_floats_can_be_not_finite(array: Any, finite: bool) -> None:
    assert is_finite(array) is finite


def test_golden_text_that_is_not_utf8_is_a_breach(onnx_model: OnnxWriter) -> None:
    model = onnx_model("identity", datatype="BYTES")
    text = np.array([[b"\xff"] * 4])
    package = write_package(model, {"x": text}, {"y": text})
    session = OnnxEngine().load(model, EngineOptions())
    with pytest.raises(ContractBreach, match="the golden inputs fail: input 'x'"):
        check_golden(session, package.manifest, load_golden(package.golden, package.manifest), 0.0)


@pytest.mark.parametrize(("scores", "reason"), [(X, None), (X * 1.0005, None), (X * 7, "0 to 7"), (-X, "-1 to 0")])
def test_confidence_is_only_read_from_shares(onnx_model: OnnxWriter, scores: Any, reason: str | None) -> None:
    model = onnx_model("identity")
    package = write_package(model, {"x": scores}, {"y": scores}, confidence=Confidence("y"))
    session = OnnxEngine().load(model, EngineOptions())
    golden = load_golden(package.golden, package.manifest)
    if reason is None:
        check_golden(session, package.manifest, golden, 0.0)
        return
    with pytest.raises(
        ContractBreach, match=f"output 'y': confidence is read from it, but it holds {reason}, not 0 to 1"
    ):
        check_golden(session, package.manifest, golden, 0.0)
