"""Writes small ONNX files without the `onnx` package: just enough of the protobuf encoding for a test's graph.

Field numbers are those of onnx.proto3 (ModelProto, GraphProto, NodeProto, AttributeProto, TensorProto, ValueInfoProto).
Datatypes are given by their Open Inference Protocol names. A dimension is an int, or a str for a symbolic one.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

# Open Inference Protocol datatype -> TensorProto.DataType
ELEMENT_TYPES = {
    "FP32": 1,
    "UINT8": 2,
    "INT8": 3,
    "UINT16": 4,
    "INT16": 5,
    "INT32": 6,
    "INT64": 7,
    "BYTES": 8,
    "BOOL": 9,
    "FP16": 10,
    "FP64": 11,
    "UINT32": 12,
    "UINT64": 13,
}
_NUMPY = {
    np.dtype(np.float32): 1,
    np.dtype(np.uint8): 2,
    np.dtype(np.int8): 3,
    np.dtype(np.int32): 6,
    np.dtype(np.int64): 7,
    np.dtype(np.float64): 11,
}
IR_VERSION = 8
OPSET = 17


class Value(NamedTuple):
    """A graph input or output."""

    name: str
    datatype: str
    shape: Sequence[int | str]


class Node(NamedTuple):
    """One operator. An attribute is an int, a float, a list of ints or an array."""

    op: str
    inputs: Sequence[str]
    outputs: Sequence[str]
    attributes: Mapping[str, Any] = {}


def write_model(
    path: Path,
    nodes: Iterable[Node],
    inputs: Iterable[Value],
    outputs: Iterable[Value],
    weights: Mapping[str, np.ndarray[Any, Any]] = {},
) -> Path:
    """Write one graph to `path`, making its folder, and return the path."""
    graph = b"".join(_message(1, _node(node)) for node in nodes)
    graph += _message(2, b"test")
    graph += b"".join(_message(5, _message(8, name.encode()) + _tensor(array)) for name, array in weights.items())
    graph += b"".join(_message(11, _value(value)) for value in inputs)
    graph += b"".join(_message(12, _value(value)) for value in outputs)
    model = _number(1, IR_VERSION) + _message(7, graph) + _message(8, _number(2, OPSET))
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(model)
    return path


def identity_model(path: Path, datatype: str = "FP32", shape: Sequence[int | str] = ("n", 4)) -> Path:
    """`y = x` for any datatype."""
    node = Node("Identity", ["x"], ["y"])
    return write_model(path, [node], [Value("x", datatype, shape)], [Value("y", datatype, shape)])


def scale_model(path: Path, factor: float = 2.0, width: int = 4) -> Path:
    """`y = x * factor`, FP32 [n, width]: two versions with different factors are easy to tell apart."""
    node = Node("Mul", ["x", "factor"], ["y"])
    x, y = Value("x", "FP32", ["n", width]), Value("y", "FP32", ["n", width])
    return write_model(path, [node], [x], [y], {"factor": np.array(factor, np.float32)})


def nan_model(path: Path, width: int = 4) -> Path:
    """`y = log(x)`: finite for positive input, NaN for negative, -inf for zero."""
    x, y = Value("x", "FP32", ["n", width]), Value("y", "FP32", ["n", width])
    return write_model(path, [Node("Log", ["x"], ["y"])], [x], [y])


def sum_model(path: Path, width: int = 4) -> Path:
    """`sum = a + b`, `difference = a - b`: two inputs that share the batch, two outputs."""
    nodes = [Node("Add", ["a", "b"], ["sum"]), Node("Sub", ["a", "b"], ["difference"])]
    values = {name: Value(name, "FP32", ["n", width]) for name in ("a", "b", "sum", "difference")}
    return write_model(path, nodes, [values["a"], values["b"]], [values["sum"], values["difference"]])


def mlp_model(path: Path, sizes: Sequence[int] = (64, 128, 10), seed: int = 0) -> Path:
    """A dense network with seeded random weights, Relu between layers, Softmax at the end: FP32 `x` -> `y`."""
    rng = np.random.default_rng(seed)
    weights: dict[str, np.ndarray[Any, Any]] = {}
    nodes, last = [], "x"
    for layer, (fan_in, fan_out) in enumerate(pairwise(sizes)):
        weights[f"w{layer}"] = (rng.standard_normal((fan_in, fan_out)) / np.sqrt(fan_in)).astype(np.float32)
        weights[f"b{layer}"] = np.zeros(fan_out, np.float32)
        final = layer == len(sizes) - 2
        nodes.append(Node("Gemm", [last, f"w{layer}", f"b{layer}"], [f"z{layer}"]))
        last = "y" if final else f"a{layer}"
        nodes.append(Node("Softmax" if final else "Relu", [f"z{layer}"], [last], {"axis": -1} if final else {}))
    x, y = Value("x", "FP32", ["n", sizes[0]]), Value("y", "FP32", ["n", sizes[-1]])
    return write_model(path, nodes, [x], [y], weights)


def endless_model(path: Path) -> Path:
    """Loads at once, then doubles `x` 2^62 times: a run that never ends. FP32 [4]."""
    body = _message(1, _node(Node("Identity", ["go"], ["go_on"])))
    body += _message(1, _node(Node("Add", ["state", "state"], ["next"]))) + _message(2, b"body")
    for field, values in (
        (11, [Value("i", "INT64", []), Value("go", "BOOL", []), Value("state", "FP32", [4])]),
        (12, [Value("go_on", "BOOL", []), Value("next", "FP32", [4])]),
    ):
        body += b"".join(_message(field, _value(value)) for value in values)
    loop = Node("Loop", ["count", "yes", "x"], ["y"], {"body": body})
    weights = {"count": np.array(1 << 62, np.int64), "yes": np.array(True)}
    return write_model(path, [loop], [Value("x", "FP32", [4])], [Value("y", "FP32", [4])], weights)


def _node(node: Node) -> bytes:
    out = b"".join(_message(1, name.encode()) for name in node.inputs)
    out += b"".join(_message(2, name.encode()) for name in node.outputs)
    out += _message(4, node.op.encode())
    return out + b"".join(_message(5, _attribute(name, value)) for name, value in node.attributes.items())


def _attribute(name: str, value: Any) -> bytes:
    head = _message(1, name.encode())
    if isinstance(value, bytes):
        return head + _message(6, value) + _number(20, 5)
    if isinstance(value, int):
        return head + _number(3, value) + _number(20, 2)
    if isinstance(value, float):
        return head + b"\x15" + np.float32(value).tobytes() + _number(20, 1)
    if isinstance(value, np.ndarray):
        return head + _message(5, _tensor(value)) + _number(20, 4)
    return head + b"".join(_number(8, item) for item in value) + _number(20, 7)


def _tensor(array: np.ndarray[Any, Any]) -> bytes:
    element_type = 9 if array.dtype == np.bool_ else _NUMPY[array.dtype]
    dims = b"".join(_number(1, dim) for dim in array.shape)
    return dims + _number(2, element_type) + _message(9, np.ascontiguousarray(array).tobytes())


def _value(value: Value) -> bytes:
    dims = b"".join(
        _message(1, _message(2, dim.encode()) if isinstance(dim, str) else _number(1, dim)) for dim in value.shape
    )
    tensor_type = _number(1, ELEMENT_TYPES[value.datatype]) + _message(2, dims)
    return _message(1, value.name.encode()) + _message(2, _message(1, tensor_type))


def _number(field: int, value: int) -> bytes:
    return _varint(field << 3) + _varint(value & 0xFFFFFFFFFFFFFFFF)


def _message(field: int, data: bytes) -> bytes:
    return _varint(field << 3 | 2) + _varint(len(data)) + data


def _varint(value: int) -> bytes:
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    out.append(value)
    return bytes(out)


MODELS = {
    "identity": identity_model,
    "scale": scale_model,
    "nan": nan_model,
    "sum": sum_model,
    "mlp": mlp_model,
    "endless": endless_model,
}


class OnnxWriter:
    """Writes any of `MODELS` by name, each call to a new file under one folder unless a path is given."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._count = 0

    def __call__(self, model: str, path: Path | None = None, **options: Any) -> Path:
        self._count += 1
        return MODELS[model](path or self._folder / f"{model}-{self._count}.onnx", **options)
