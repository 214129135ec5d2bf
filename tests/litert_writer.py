"""Writes small LiteRT files through the schema classes that ai-edge-litert ships; it has no converter of its own.

A tensor is (name, Open Inference Protocol datatype, shape with -1 for any size) or a constant array.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import flatbuffers
import numpy as np
from ai_edge_litert import schema_py_generated as schema

from models.tensor import TensorSpec

TYPES = {
    "BOOL": schema.TensorType.BOOL,
    "UINT8": schema.TensorType.UINT8,
    "UINT16": schema.TensorType.UINT16,
    "UINT32": schema.TensorType.UINT32,
    "INT8": schema.TensorType.INT8,
    "INT16": schema.TensorType.INT16,
    "INT32": schema.TensorType.INT32,
    "INT64": schema.TensorType.INT64,
    "FP16": schema.TensorType.FLOAT16,
    "FP32": schema.TensorType.FLOAT32,
    "FP64": schema.TensorType.FLOAT64,
    "UINT64": schema.TensorType.UINT64,
    "BYTES": schema.TensorType.STRING,
}


class Op(NamedTuple):
    """One builtin operator: its name, tensors by name, and the options' class with its fields."""

    name: str
    inputs: Sequence[str]
    outputs: Sequence[str]
    options: str = ""
    fields: dict[str, Any] = {}


def write_litert(
    path: Path,
    ops: Sequence[Op],
    inputs: Sequence[TensorSpec],
    outputs: Sequence[TensorSpec],
    weights: dict[str, np.ndarray[Any, Any]] | None = None,
    between: Sequence[TensorSpec] = (),
) -> Path:
    """Write one graph to `path`, making its folder, and return the path. `between`: tensors that are neither in nor out."""
    weights = weights or {}
    model, graph = schema.ModelT(), schema.SubGraphT()
    model.version, model.subgraphs, model.buffers = 3, [graph], [schema.BufferT()]
    graph.tensors, graph.operators, model.operatorCodes = [], [], []
    index = {spec.name: _add(graph, _tensor(spec)) for spec in (*inputs, *between, *outputs)}
    for name, array in weights.items():
        buffer = schema.BufferT()
        buffer.data = np.frombuffer(array.tobytes(), np.uint8)
        model.buffers.append(buffer)
        datatype = {"f": "FP32", "i": "INT32"}[array.dtype.kind]
        tensor = _tensor(TensorSpec(name, datatype, array.shape))
        tensor.buffer = len(model.buffers) - 1
        index[name] = _add(graph, tensor)
    for op in ops:
        graph.operators.append(_operator(model, op, index))
    graph.inputs = [index[spec.name] for spec in inputs]
    graph.outputs = [index[spec.name] for spec in outputs]
    builder = flatbuffers.Builder(1024)
    builder.Finish(model.Pack(builder), b"TFL3")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(bytes(builder.Output()))
    return path


def _add(graph: Any, tensor: Any) -> int:
    graph.tensors.append(tensor)
    return len(graph.tensors) - 1


def _tensor(spec: TensorSpec) -> Any:
    tensor = schema.TensorT()
    tensor.name, tensor.type, tensor.buffer = spec.name.encode(), TYPES[spec.datatype], 0
    tensor.shape = [1 if dim == -1 else dim for dim in spec.shape]
    tensor.shapeSignature = list(spec.shape)
    return tensor


def _operator(model: Any, op: Op, index: dict[str, int]) -> Any:
    code = schema.OperatorCodeT()
    builtin = getattr(schema.BuiltinOperator, op.name)
    code.builtinCode, code.deprecatedBuiltinCode, code.version = builtin, min(builtin, 127), 1
    model.operatorCodes.append(code)
    operator = schema.OperatorT()
    operator.opcodeIndex = len(model.operatorCodes) - 1
    operator.inputs = [index[name] for name in op.inputs]
    operator.outputs = [index[name] for name in op.outputs]
    if op.options:
        operator.builtinOptionsType = getattr(schema.BuiltinOptions, op.options)
        operator.builtinOptions = getattr(schema, f"{op.options}T")()
        for field, value in op.fields.items():
            setattr(operator.builtinOptions, field, value)
    return operator
