"""Answers survive the way through a shared store bit by bit, and damaged ones are recognised."""

from __future__ import annotations

import numpy as np
import pytest

from models.serving.cache.record import CorruptRecord, decode_record, encode_record
from models.serving.predictor import InferResponse
from models.tensor import DTYPES

KEY = b"k" * 32
ANSWER = InferResponse(
    outputs={"y": np.float32([[1, np.nan, -0.0]]), "t": np.array([b"a", b"\xff\0"], np.object_)},
    model="m",
    package="p",
    version="1",
    tier="edge",
    confidence=0.5,
)


def test_what_comes_back_is_what_was_stored() -> None:
    back = decode_record(KEY, encode_record(KEY, ANSWER))
    assert back.outputs["y"].tobytes() == ANSWER.outputs["y"].tobytes()
    assert back.outputs["t"].tolist() == [b"a", b"\xff\0"]
    assert (back.package, back.version, back.tier, back.confidence) == ("p", "1", "edge", 0.5)


@pytest.mark.parametrize("name", [name for name in DTYPES if name != "BYTES"])
def test_every_datatype_and_empty_shapes_come_back(name: str) -> None:
    for shape in ((2, 3), (), (0, 4)):
        outputs = {"y": np.ones(shape, DTYPES[name])}
        back = decode_record(
            KEY, encode_record(KEY, InferResponse(outputs=outputs, model="m", package="p", version="1", tier="e"))
        )
        assert back.outputs["y"].dtype == DTYPES[name]
        assert back.outputs["y"].shape == shape


def test_every_damage_is_recognised() -> None:
    data = encode_record(KEY, ANSWER)
    for index in range(len(data)):
        with pytest.raises(CorruptRecord):
            decode_record(KEY, data[:index])
        with pytest.raises(CorruptRecord):
            decode_record(KEY, data[:index] + bytes([data[index] ^ 1]) + data[index + 1 :])


def test_an_answer_stored_under_another_key_is_none() -> None:
    with pytest.raises(CorruptRecord):
        decode_record(b"q" * 32, encode_record(KEY, ANSWER))
