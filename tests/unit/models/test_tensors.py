"""Weights are found where the formats say they are, and a damaged file is no more than a file without them."""

from __future__ import annotations

import random
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest

from models.tensors import tensor_spans
from tests.onnx_writer import Node, Value, write_model

ZOO = Path("models/zoo/digits/artifacts")


def onnx(path: Path, weights: dict[str, np.ndarray]) -> bytes:  # type: ignore[type-arg]
    nodes = [Node("MatMul", ["x", next(iter(weights))], ["y"])]
    return write_model(
        path, nodes, [Value("x", "FP32", ("n", 4))], [Value("y", "FP32", ("n", 4))], weights
    ).read_bytes()


def test_every_weight_of_an_onnx_file_is_found_byte_for_byte(tmp_path: Path) -> None:
    weights = {name: np.random.default_rng(seed).random((32, 32), np.float32) for seed, name in enumerate("abc")}
    data = onnx(tmp_path / "model.onnx", weights)
    found = [data[start:end] for start, end in tensor_spans(memoryview(data))]
    assert sorted(found) == sorted(array.tobytes() for array in weights.values())


def test_the_weights_of_a_tflite_file_are_found() -> None:
    data = (ZOO / "1/digits-int8/model.tflite").read_bytes()
    spans = tensor_spans(memoryview(data))
    assert spans
    assert all(0 < start < end <= len(data) for start, end in spans)
    assert sum(end - start for start, end in spans) > len(data) / 4


def test_spans_are_ascending_and_disjoint_whatever_the_file_says() -> None:
    for path in ZOO.glob("*/*/model.*"):
        spans = tensor_spans(memoryview(path.read_bytes()))
        assert all(before[1] <= after[0] for before, after in pairwise(spans))


@pytest.mark.parametrize(
    "data", [b"", b"\x00", b"TFL3", b"\xff" * 100, b"\0\0\0\0TFL3", b"\x20\0\0\0TFL3" + b"\xff" * 60]
)
def test_what_is_no_model_has_no_weights(data: bytes) -> None:
    assert tensor_spans(memoryview(data)) == []


def test_a_damaged_file_raises_nothing_and_points_nowhere_outside() -> None:
    uniform = random.Random(7)
    for path in sorted(ZOO.glob("1/digits-int8/model.*")):
        whole = path.read_bytes()
        for _ in range(300):
            data = bytearray(whole[: uniform.randrange(len(whole))])
            for _ in range(uniform.randrange(1, 8)):
                if data:
                    data[uniform.randrange(len(data))] = uniform.randrange(256)
            assert all(0 <= start < end <= len(data) for start, end in tensor_spans(memoryview(bytes(data))))
