"""Tiny models with known answers, written for every engine: what the engines' conformance suite runs.

A `Tiny` says what the model takes, gives and computes (in numpy); `write` makes the file in one of `FORMATS`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from onnx_writer import Node, Value, write_model

from models.engines import EngineOptions
from models.tensor import DTYPES, TensorSpec

Arrays = Mapping[str, np.ndarray[Any, Any]]

RNG = np.random.default_rng(0)
W1 = RNG.standard_normal((6, 5)).astype(np.float32)
B1 = RNG.standard_normal(5).astype(np.float32)
W2 = RNG.standard_normal((5, 3)).astype(np.float32)
KERNEL = RNG.integers(-3, 4, (2, 1, 3, 3)).astype(np.float32)
"""Output channels, input channels, height, width; whole numbers, so that every engine's sums are exact."""
FACTOR = np.float32(2.5)


@dataclass(frozen=True)
class Tiny:
    """`compute`: input arrays -> output arrays by name. `tolerance`: 0 = exact."""

    name: str
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    compute: Callable[[Arrays], Arrays]
    tolerance: float = 0.0

    def example(self, rows: int = 3, seed: int = 0) -> dict[str, np.ndarray[Any, Any]]:
        """Inputs with `rows` for every free size: small whole numbers, so that every type can hold them."""
        rng = np.random.default_rng(seed)
        return {spec.name: _example(spec, rows, rng) for spec in self.inputs}


def _example(spec: TensorSpec, rows: int, rng: np.random.Generator) -> np.ndarray[Any, Any]:
    shape = tuple(rows if dim == -1 else dim for dim in spec.shape)
    numbers = np.asarray(rng.integers(0, 2 if spec.datatype == "BOOL" else 9, shape))
    if spec.datatype == "BYTES":
        return np.array([f"{number}é".encode() for number in numbers.flat], np.object_).reshape(shape)
    return np.asarray(numbers.astype(DTYPES[spec.datatype]))


def identity(datatype: str = "FP32", shape: tuple[int, ...] = (-1, 4)) -> Tiny:
    x, y = TensorSpec("x", datatype, shape), TensorSpec("y", datatype, shape)
    return Tiny("identity", (x,), (y,), lambda arrays: {"y": arrays["x"]})


def _dense(arrays: Arrays) -> Arrays:
    hidden = np.maximum(arrays["x"] @ W1 + B1, 0) @ W2
    scores = np.exp(hidden - hidden.max(-1, keepdims=True))
    return {"y": scores / scores.sum(-1, keepdims=True)}


def _convolve(arrays: Arrays) -> Arrays:
    windows = np.lib.stride_tricks.sliding_window_view(arrays["x"], (3, 3), axis=(2, 3))
    return {"y": np.einsum("nchwij,ocij->nohw", windows, KERNEL)}


def _spec(name: str, *shape: int) -> TensorSpec:
    return TensorSpec(name, "FP32", shape)


SCALE = Tiny("scale", (_spec("x", -1, 4),), (_spec("y", -1, 4),), lambda arrays: {"y": arrays["x"] * FACTOR})
SUM = Tiny(
    "sum",
    (_spec("a", -1, 4), _spec("b", -1, 4)),
    (_spec("sum", -1, 4), _spec("difference", -1, 4)),
    lambda arrays: {"sum": arrays["a"] + arrays["b"], "difference": arrays["a"] - arrays["b"]},
)
DENSE = Tiny("dense", (_spec("x", -1, 6),), (_spec("y", -1, 3),), _dense, tolerance=1e-6)
CONVOLUTION = Tiny("convolution", (_spec("x", -1, 1, 6, 6),), (_spec("y", -1, 2, 4, 4),), _convolve)
SCALAR = identity("FP32", ())
DEEP = identity("INT32", (1, 2, 1, 2, 1, 3, 1, 2))
TINY = (SCALE, SUM, DENSE, CONVOLUTION, SCALAR, DEEP)


# --- ONNX ----------------------------------------------------------------------------------------------------------------


def write_onnx(tiny: Tiny, folder: Path) -> Path:
    nodes, weights = {
        "identity": ([Node("Identity", ["x"], ["y"])], {}),
        "scale": ([Node("Mul", ["x", "factor"], ["y"])], {"factor": np.array(FACTOR)}),
        "sum": ([Node("Add", ["a", "b"], ["sum"]), Node("Sub", ["a", "b"], ["difference"])], {}),
        "dense": (
            [
                Node("Gemm", ["x", "w1", "b1"], ["h"]),
                Node("Relu", ["h"], ["r"]),
                Node("MatMul", ["r", "w2"], ["s"]),
                Node("Softmax", ["s"], ["y"], {"axis": -1}),
            ],
            {"w1": W1, "b1": B1, "w2": W2},
        ),
        "convolution": ([Node("Conv", ["x", "k"], ["y"])], {"k": KERNEL}),
    }[tiny.name]
    inputs, outputs = ([_value(spec) for spec in side] for side in (tiny.inputs, tiny.outputs))
    return write_model(folder / "model.onnx", nodes, inputs, outputs, weights)


def _value(spec: TensorSpec) -> Value:
    return Value(spec.name, spec.datatype, ["n" if dim == -1 else dim for dim in spec.shape])


# --- LiteRT --------------------------------------------------------------------------------------------------------------


def write_tflite(tiny: Tiny, folder: Path) -> Path:
    from litert_writer import Op, write_litert

    ops, weights, between = {
        "identity": (
            [Op("RESHAPE", ["x", "to"], ["y"], "ReshapeOptions", {"newShape": list(tiny.outputs[0].shape)})],
            {"to": np.array(tiny.outputs[0].shape, np.int32)},
            (),
        ),
        "scale": ([Op("MUL", ["x", "factor"], ["y"], "MulOptions")], {"factor": np.array(FACTOR)}, ()),
        "sum": (
            [Op("ADD", ["a", "b"], ["sum"], "AddOptions"), Op("SUB", ["a", "b"], ["difference"], "SubOptions")],
            {},
            (),
        ),
        "dense": (
            [
                Op(
                    "FULLY_CONNECTED", ["x", "w1", "b1"], ["h"], "FullyConnectedOptions", {"fusedActivationFunction": 1}
                ),
                Op("FULLY_CONNECTED", ["h", "w2", "b2"], ["s"], "FullyConnectedOptions"),
                Op("SOFTMAX", ["s"], ["y"], "SoftmaxOptions", {"beta": 1.0}),
            ],
            {"w1": W1.T.copy(), "b1": B1, "w2": W2.T.copy(), "b2": np.zeros(3, np.float32)},
            (_spec("h", -1, 5), _spec("s", -1, 3)),
        ),
        # LiteRT keeps channels last: transposed on the way in and out, so that one numpy function says what is right.
        "convolution": (
            [
                Op("TRANSPOSE", ["x", "last"], ["h"], "TransposeOptions"),
                Op("CONV_2D", ["h", "k", "b"], ["c"], "Conv2DOptions", {"padding": 1, "strideH": 1, "strideW": 1}),
                Op("TRANSPOSE", ["c", "first"], ["y"], "TransposeOptions"),
            ],
            {
                "last": np.array([0, 2, 3, 1], np.int32),
                "first": np.array([0, 3, 1, 2], np.int32),
                "k": KERNEL.transpose(0, 2, 3, 1).copy(),
                "b": np.zeros(2, np.float32),
            },
            (_spec("h", -1, 6, 6, 1), _spec("c", -1, 4, 4, 2)),
        ),
    }[tiny.name]
    return write_litert(folder / "model.tflite", ops, tiny.inputs, tiny.outputs, weights, between)


# --- PyTorch -------------------------------------------------------------------------------------------------------------


def torch_module(name: str) -> Any:
    """The model as a module that both of PyTorch's formats can be made of."""
    import torch

    class Identity(torch.nn.Module):
        def forward(self, x: torch.Tensor):  # type: ignore[no-untyped-def]
            return x.clone()

    class Scale(torch.nn.Module):
        def forward(self, x: torch.Tensor):  # type: ignore[no-untyped-def]
            return x * 2.5

    class Sum(torch.nn.Module):
        def forward(self, a: torch.Tensor, b: torch.Tensor):  # type: ignore[no-untyped-def]
            return {"sum": a + b, "difference": a - b}

    if name == "dense":
        first, second = torch.nn.Linear(6, 5), torch.nn.Linear(5, 3, bias=False)
        weights = ((first.weight, W1.T), (first.bias, B1), (second.weight, W2.T))
        module: Any = torch.nn.Sequential(first, torch.nn.ReLU(), second, torch.nn.Softmax(-1))
    elif name == "convolution":
        module = torch.nn.Conv2d(1, 2, 3, bias=False)
        weights = ((module.weight, KERNEL),)
    else:
        module, weights = {"identity": Identity, "scale": Scale, "sum": Sum}[name](), ()
    with torch.no_grad():
        for parameter, value in weights:
            parameter.copy_(torch.from_numpy(value.copy()))
    return module.eval()


def write_torchscript(tiny: Tiny, folder: Path) -> Path:
    import torch

    folder.mkdir(parents=True, exist_ok=True)
    torch.jit.script(torch_module(tiny.name)).save(str(folder / "model.pt"))
    return folder / "model.pt"


def write_export(tiny: Tiny, folder: Path) -> Path:
    import torch

    folder.mkdir(parents=True, exist_ok=True)
    arguments = tuple(torch.from_numpy(array) for array in tiny.example().values())
    free = tuple({0: torch.export.Dim("n")} if spec.shape[:1] == (-1,) else None for spec in tiny.inputs)
    torch.export.save(
        torch.export.export(torch_module(tiny.name), arguments, dynamic_shapes=free), folder / "model.pt2"
    )
    return folder / "model.pt2"


FORMATS: dict[str, tuple[str, Callable[[Tiny, Path], Path]]] = {
    "onnx": ("onnx", write_onnx),
    "tflite": ("litert", write_tflite),
    "torchscript": ("torch", write_torchscript),
    "export": ("torch", write_export),
}
"""Format -> the engine that loads it, and its writer."""


def write(form: str, tiny: Tiny, folder: Path) -> tuple[str, Path, EngineOptions]:
    """Engine, file, and the options that a manifest of the model would give."""
    engine, writer = FORMATS[form]
    return engine, writer(tiny, folder), EngineOptions(inputs=tiny.inputs, outputs=tiny.outputs)
