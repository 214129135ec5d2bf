"""Values become the model's tensors exactly, or not at all."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from models.client.answer import Metadata
from models.client.tensors import as_sent, as_wanted
from models.errors import InvalidRequest
from models.tensor import TensorSpec


def model(datatype: str) -> Metadata:
    return Metadata("m", ("1",), "onnx", (TensorSpec("x", datatype, (-1,)),), ())


def test_named_arrays_are_sent_as_they_are() -> None:
    x = np.arange(3)
    sent = as_sent({"x": x})
    assert sent is not None
    assert sent["x"] is x
    assert as_sent({"x": [1]}) is None
    assert as_sent(x) is None


@pytest.mark.parametrize(
    ("datatype", "value", "dtype"),
    [
        ("FP32", [1, 2.5], np.float32),
        ("FP64", [1, 2], np.float64),
        ("FP16", [1.5], np.float16),
        ("INT8", [-128, 127], np.int8),
        ("UINT64", [2**64 - 1], np.uint64),
        ("UINT64", [0, 2**63], np.uint64),
        ("INT64", [], np.int64),
        ("BOOL", [True, False], np.bool_),
        ("FP32", 3, np.float32),
        ("FP32", ((1, 2), (3, 4)), np.float32),
    ],
)
def test_lists_become_the_models_datatype(datatype: str, value: Any, dtype: Any) -> None:
    got = as_wanted(value, model(datatype))["x"]
    assert got.dtype == dtype
    assert np.array_equal(got, np.array(value, dtype))


def test_texts_keep_every_byte() -> None:
    got = as_wanted([b"a\x00", "ü"], model("BYTES"))["x"]
    assert got.tolist() == [b"a\x00", "ü"]


@pytest.mark.parametrize(
    ("datatype", "value"),
    [
        ("INT32", [1.5]),
        ("INT8", [128]),
        ("UINT8", [-1]),
        ("INT64", [2**63]),
        ("INT64", [2**70]),
        ("INT32", [True]),
        ("BOOL", [1]),
        ("FP32", ["1.5"]),
        ("FP32", [None]),
        ("FP32", [[1], [2, 3]]),
        ("FP32", {1, 2}),
        ("ODD", [1]),
    ],
)
def test_what_does_not_fit_is_refused_by_name(datatype: str, value: Any) -> None:
    with pytest.raises(InvalidRequest, match="'x'"):
        as_wanted({"x": value}, model(datatype))


def test_an_unknown_input_is_named_with_those_there_are() -> None:
    with pytest.raises(InvalidRequest, match=r"no input 'z', it has 'x'"):
        as_wanted({"z": [1]}, model("FP32"))
