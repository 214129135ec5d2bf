"""Equal questions have one key, different ones never share one."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from models.serving.cache.key import INLINE_BYTES, MAX_INPUT_BYTES, key_of, request_key
from models.serving.predictor import InferRequest
from models.tensor import Array

X = np.arange(4, dtype=np.float32)


def key(digest: bytes = b"d", **fields: Any) -> bytes | None:
    fields.setdefault("inputs", {"x": X})
    return key_of(digest, InferRequest(model="m", **fields))


def texts(*elements: object) -> Array:
    array = np.empty(len(elements), np.object_)
    array[:] = elements
    return array


def test_what_says_nothing_about_the_answer_does_not_count() -> None:
    one = key_of(b"d", InferRequest(model="m", inputs={"x": X, "y": X}, id="1", deadline=1.0, client="a", trace="t"))
    other = key_of(b"d", InferRequest(model="alias", inputs={"y": X.copy(), "x": X}, id="2", client="b", priority=3))
    assert one == other


def test_the_layout_in_memory_does_not_count() -> None:
    square = np.arange(16, dtype=np.float32).reshape(4, 4)
    assert key(inputs={"x": square.T}) == key(inputs={"x": square.T.copy()})
    assert key(inputs={"x": square}) != key(inputs={"x": square.T})


PAIRS: list[tuple[dict[str, Any], dict[str, Any]]] = [
    ({"digest": b"d"}, {"digest": b"e"}),
    ({"tenant": None}, {"tenant": ""}),
    ({"tenant": "a"}, {"tenant": "b"}),
    ({"outputs": ()}, {"outputs": ("y",)}),
    ({"outputs": ("y", "z")}, {"outputs": ("z", "y")}),
    ({"outputs": ("yz",)}, {"outputs": ("y", "z")}),
    ({"tenant": "a", "outputs": ("b",)}, {"tenant": "ab"}),
    ({"inputs": {"x": X}}, {"inputs": {"y": X}}),
    ({"inputs": {"x": X}}, {"inputs": {"x": X.reshape(2, 2)}}),
    ({"inputs": {"x": X}}, {"inputs": {"x": X.view(np.int32)}}),
    ({"inputs": {"x": X}}, {"inputs": {"x": X.astype(">f4")}}),
    ({"inputs": {"x": X}}, {"inputs": {"x": X, "y": X}}),
    ({"inputs": {"x": np.float32([0.0])}}, {"inputs": {"x": np.float32([-0.0])}}),
    (
        {"inputs": {"x": np.array([0x7FC00000], np.uint32).view(np.float32)}},
        {"inputs": {"x": np.array([0x7FC00001], np.uint32).view(np.float32)}},
    ),
    ({"inputs": {"x": np.zeros((0, 2), np.int8)}}, {"inputs": {"x": np.zeros((2, 0), np.int8)}}),
    ({"inputs": {"x": texts(b"ab", b"")}}, {"inputs": {"x": texts(b"a", b"b")}}),
    ({"inputs": {"x": texts(b"a\0\0\0\1b")}}, {"inputs": {"x": texts(b"a", b"b")}}),
    ({"inputs": {"x": texts("a")}}, {"inputs": {"x": texts(b"a")}}),
]


@pytest.mark.parametrize(("one", "other"), PAIRS)
def test_different_questions_have_different_keys(one: dict[str, Any], other: dict[str, Any]) -> None:
    assert key(**one) != key(**other)
    assert key(**one) == key(**one)


def test_the_same_nan_is_the_same_input() -> None:
    assert key(inputs={"x": np.float32([np.nan])}) == key(inputs={"x": np.float32([np.nan])})


def test_elements_that_are_no_text_have_no_key() -> None:
    assert key(inputs={"x": texts(b"a", 3)}) is None


async def test_large_inputs_are_hashed_in_a_thread_to_the_same_key_and_huge_ones_not_at_all() -> None:
    large = InferRequest(model="m", inputs={"x": np.zeros(INLINE_BYTES + 1, np.uint8)})
    assert await request_key(b"d", large) == key_of(b"d", large)
    huge = InferRequest(model="m", inputs={"x": np.zeros(MAX_INPUT_BYTES + 1, np.uint8)})
    assert await request_key(b"d", huge) is None
