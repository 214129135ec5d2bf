"""The networks that are served: random seeded weights, FP32, input `x`, output `y`, a free first dimension.

`mlp`     64-128-10, microseconds: what remains is the server.
`dense`   a narrow deep autoencoder, about 0.1 ms a row, a seventh of that in a batch of 32: where batching pays.
`cnn`     MobileNetV1 x0.5 at 96x96x3, about 0.6 ms, 110,592 bytes of input.
`steady`  convolutions of about 5 ms on a tiny input: what overload is tried on.
`slow`    the same, some 20 ms: the neighbour that others must not feel.
`big`     two dense layers of 100 MB: an update that arrives under load.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import onnxruntime
from onnx_writer import Node, Value, mlp_model, write_model

Array = np.ndarray[Any, Any]

CNN_SIDE = 96
CNN_BLOCKS = (
    (32, 1),
    (64, 2),
    (64, 1),
    (128, 2),
    (128, 1),
    (256, 2),
    (256, 1),
    (256, 1),
    (256, 1),
    (256, 1),
    (256, 1),
    (512, 2),
    (512, 1),
)
"""Output channels and stride of each depthwise separable block (Howard et al. 2017, table 1, half the width)."""
CLASSES = 10
DENSE_WIDTH, DENSE_LAYERS, DENSE_CODE = 64, 120, 16
STEADY_LAYERS = 13
SLOW_LAYERS = 50
BIG_WIDTH = 340_000
"""Of (64 + 10) weights of four bytes each: 100 MB."""


class Network(NamedTuple):
    """A model file, and the inputs and answers that servers are checked with."""

    name: str
    path: Path
    x: Array
    y: Array


class _Graph:
    """Nodes in a chain, each with weights scaled so that values neither vanish nor blow up."""

    def __init__(self, seed: int) -> None:
        self.nodes: list[Node] = []
        self.weights: dict[str, Array] = {}
        self._rng = np.random.default_rng(seed)
        self.last = "x"

    def add(self, op: str, weights: Sequence[Array] = (), **attributes: Any) -> None:
        number = len(self.nodes)
        names = [f"w{number}_{index}" for index in range(len(weights))]
        self.weights |= dict(zip(names, weights, strict=True))
        self.nodes.append(Node(op, [self.last, *names], [f"t{number}"], attributes))
        self.last = f"t{number}"

    def convolution(self, fan_in: int, fan_out: int, kernel: int, stride: int = 1, group: int = 1) -> None:
        weights = self.random(fan_out, fan_in // group, kernel, kernel, fan=fan_in // group * kernel * kernel)
        pads = [kernel // 2] * 4
        bias = np.zeros(fan_out, np.float32)
        self.add("Conv", [weights, bias], kernel_shape=[kernel] * 2, strides=[stride] * 2, pads=pads, group=group)
        self.add("Relu")

    def classifier(self, fan_in: int) -> None:
        self.add("GlobalAveragePool")
        self.add("Flatten")
        self.dense(fan_in, CLASSES)
        self.add("Softmax", axis=-1)

    def dense(self, fan_in: int, fan_out: int) -> None:
        self.add("Gemm", [self.random(fan_in, fan_out, fan=fan_in), np.zeros(fan_out, np.float32)])

    def random(self, *shape: int, fan: int) -> Array:
        return (self._rng.standard_normal(shape) * np.sqrt(2 / fan)).astype(np.float32)

    def write(self, path: Path, x: Sequence[int | str], y: Sequence[int | str]) -> Path:
        self.nodes[-1] = self.nodes[-1]._replace(outputs=["y"])
        return write_model(path, self.nodes, [Value("x", "FP32", x)], [Value("y", "FP32", y)], self.weights)


def cnn_model(path: Path) -> Path:
    graph = _Graph(2)
    graph.convolution(3, 16, 3, stride=2)
    channels = 16
    for wider, stride in CNN_BLOCKS:
        graph.convolution(channels, channels, 3, stride=stride, group=channels)
        graph.convolution(channels, wider, 1)
        channels = wider
    graph.classifier(channels)
    return graph.write(path, ["n", 3, CNN_SIDE, CNN_SIDE], ["n", CLASSES])


def dense_model(path: Path) -> Path:
    half = [DENSE_WIDTH] * (DENSE_LAYERS // 2)
    graph = _Graph(3)
    for fan_in, fan_out in pairwise([*half, DENSE_CODE, *half]):
        graph.dense(fan_in, fan_out)
        graph.add("Relu")
    graph.dense(DENSE_WIDTH, DENSE_WIDTH)
    return graph.write(path, ["n", DENSE_WIDTH], ["n", DENSE_WIDTH])


def convolutions_model(path: Path, layers: int) -> Path:
    """64 numbers become 32 channels of 16x16, which `layers` convolutions of 3x3 pass on."""
    graph = _Graph(4)
    graph.dense(64, 32 * 256)
    graph.add("Reshape", [np.array([-1, 32, 16, 16], np.int64)])
    channels = 32
    for _ in range(layers):
        graph.convolution(channels, 96, 3)
        channels = 96
    graph.classifier(channels)
    return graph.write(path, ["n", 64], ["n", CLASSES])


def write_big(folder: Path, version: int) -> Network:
    """`big` as `folder/<version>/model.onnx`."""
    graph = _Graph(version)
    graph.dense(64, BIG_WIDTH)
    graph.dense(BIG_WIDTH, CLASSES)
    path = graph.write(folder / str(version) / "model.onnx", ["n", 64], ["n", CLASSES])
    return _described("big", path)


def write_networks(folder: Path, names: Sequence[str]) -> dict[str, Network]:
    """Write models in the layout `folder/<name>/1/model.onnx`."""
    written: dict[str, Network] = {}
    for name in names:
        path = folder / name / "1" / "model.onnx"
        if name == "mlp":
            mlp_model(path)
        elif name == "dense":
            dense_model(path)
        elif name == "cnn":
            cnn_model(path)
        else:
            convolutions_model(path, STEADY_LAYERS if name == "steady" else SLOW_LAYERS)
        written[name] = _described(name, path)
    return written


def _described(name: str, path: Path) -> Network:
    session = open_session(path)
    shape = [1, *session.get_inputs()[0].shape[1:]]
    x = np.random.default_rng(1).standard_normal(shape).astype(np.float32)
    return Network(name, path, x, session.run(["y"], {"x": x})[0])


def open_session(path: Path) -> onnxruntime.InferenceSession:
    """One thread, as every server here runs its models."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
