"""Remembered heads change what encoding and decoding cost, never what they say. (The round trip: `test_codec.py`.)"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from models.errors import Unreachable
from models.serving.codec import OutputForm, decode_request, encode_response
from models.serving.codec_client import MAX_HEADS, Heads, encode_request, header_length_of, read_response
from models.serving.predictor import InferRequest, InferResponse
from models.serving.reply import Reply

RNG = np.random.default_rng(3)
X = RNG.standard_normal((2, 4)).astype(np.float32)

REQUESTS: list[dict[str, Any]] = [
    {"inputs": {"x": X}},
    {"inputs": {"x": X + 1}},
    {"inputs": {"x": X.reshape(4, 2)}},
    {"inputs": {"x": X.astype(np.float64)}},
    {"inputs": {"x": X.view(np.int32)}},
    {"inputs": {"x": X.T}},
    {"inputs": {"x": X[:, ::2]}},
    {"inputs": {"x": X.astype(">f4")}},
    {"inputs": {"x": np.array(["a", "bc"], object)}},
    {"inputs": {"x": np.array(["abcd", "e"], object)}},
    {"inputs": {"x": np.array(["a", "bc"])}},
    {"inputs": {"x": np.array([True, False])}},
    {"inputs": {"x": np.zeros((0, 4), np.float32)}},
    {"inputs": {"y": X}},
    {"inputs": {"x": X, "y": X * 2}},
    {"inputs": {"x": X}, "outputs": ("y",)},
    {"inputs": {"x": X}, "outputs": ("y", "z")},
    {"inputs": {"x": X}, "min_confidence": 0.5},
    {"inputs": {"x": X}, "priority": 2},
    {"inputs": {"x": X}, "id": "a"},
    {"inputs": {"x": X}, "id": "b"},
    {"inputs": {"x": X}, "parameters": {"a": 1}},
    {"inputs": {"x": X}, "parameters": {"a": 2}},
]


def test_a_request_is_the_same_with_and_without_memory() -> None:
    heads = Heads()
    for _ in range(3):
        for order in (REQUESTS, REQUESTS[::-1]):
            for more in order:
                request = InferRequest(model="m", **more)
                parts = encode_request(request, heads)
                assert parts == encode_request(request)
                got, _ = decode_request(b"".join(parts), len(parts[0]), model="m")
                for name, array in request.inputs.items():
                    if array.dtype.kind in "OSU":
                        assert [each.decode() for each in got.inputs[name]] == [str(each) for each in array]
                    else:
                        assert np.array_equal(got.inputs[name], array)
    assert heads.sent


def answer(**more: Any) -> tuple[bytes, int | None]:
    options: dict[str, Any] = {
        "outputs": {"y": X},
        "model": "m",
        "package": "p",
        "version": "1",
        "tier": "edge",
        **more,
    }
    request_id = options.pop("request_id", None)
    parts, length = encode_response(InferResponse(**options), OutputForm(True), request_id)
    return b"".join(parts), length


ANSWERS = [
    answer(),
    answer(outputs={"y": X * 2}),
    answer(outputs={"y": X, "z": X.astype(np.int64)}),
    answer(outputs={"y": X[:1]}),
    answer(outputs={"y": np.array([b"a", b"bcd"], object)}),
    answer(outputs={"y": np.array([b"abc", b"d"], object)}),
    answer(outputs={"y": np.array([True, False])}),
    answer(outputs={"y": np.zeros((0, 4), np.float32)}),
    answer(confidence=0.5),
    answer(confidence=0.25),
    answer(request_id="a"),
    answer(request_id="b"),
    answer(version="2", tier="cloud", degraded=True, reason="up_late"),
]


def test_an_answer_is_the_same_with_and_without_memory() -> None:
    heads = Heads()
    for _ in range(3):
        for body, length in ANSWERS:
            outputs, head = read_response(body, length, "it", heads)
            wanted, wanted_head = read_response(body, length, "it")
            assert list(outputs) == list(wanted)
            assert all(np.array_equal(outputs[name], wanted[name]) for name in wanted)
            assert all(outputs[name].dtype == wanted[name].dtype for name in wanted)
            assert (head.parameters, head.id, head.model_version) == (
                wanted_head.parameters,
                wanted_head.id,
                wanted_head.model_version,
            )
    assert heads.received


def test_a_known_head_with_a_shorter_body_is_no_answer() -> None:
    heads = Heads()
    body, length = ANSWERS[0]
    read_response(body, length, "it", heads)
    with pytest.raises(Unreachable):
        read_response(body[:-1], length, "it", heads)


def test_memory_is_bounded() -> None:
    heads = Heads()
    for number in range(2 * MAX_HEADS):
        encode_request(InferRequest(model="m", inputs={f"x{number}": X}), heads)
        body, length = answer(version=str(number))
        read_response(body, length, "it", heads)
    assert len(heads.sent) <= MAX_HEADS
    assert len(heads.received) <= MAX_HEADS


@pytest.mark.parametrize("value", [b"", b"0", b"-1", b"+1", b"1_0", b" 1", b"99", b"9" * 5000, b"x"])
def test_a_length_that_is_none_is_no_answer(value: bytes) -> None:
    with pytest.raises(Unreachable):
        header_length_of(Reply(200, {b"inference-header-content-length": value}, b"0123456789ab"), "it")
