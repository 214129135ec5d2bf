"""Bounded by bytes, oldest first, and nobody's answer can be altered by another."""

from __future__ import annotations

import numpy as np
import pytest

from models.errors import InvalidRequest
from models.serving.cache.memory import ENTRY_BYTES, Kept, Memory
from models.serving.predictor import InferResponse
from models.tensor import Array


def kept(array: Array) -> Kept:
    return Kept(InferResponse(outputs={"y": array}, model="m", package="p", version="1", tier="edge", id="theirs"))


def sized(data: int) -> Kept:
    return kept(np.zeros(data, np.uint8))


def test_the_bytes_held_never_pass_the_budget_and_the_one_used_longest_ago_goes() -> None:
    entry = sized(1000)
    memory = Memory(10 * entry.bytes)
    for number in range(10):
        memory.put(b"%d" % number, sized(1000))
    assert memory.get(b"0") is not None
    memory.put(b"new", sized(1000))
    assert (len(memory), memory.bytes, memory.evictions) == (10, 10 * entry.bytes, 1)
    assert memory.get(b"0") is not None
    assert memory.get(b"1") is None


def test_overhead_counts_so_that_tiny_answers_are_bounded_too() -> None:
    memory = Memory(100 * ENTRY_BYTES)
    for number in range(1000):
        memory.put(b"%d" % number, sized(1))
    assert len(memory) < 100


def test_one_answer_above_an_eighth_of_the_budget_is_refused() -> None:
    memory = Memory(8 * sized(5000).bytes)
    memory.put(b"fits", sized(5000))
    memory.put(b"large", sized(5001))
    assert memory.get(b"fits") is not None
    assert memory.get(b"large") is None


def test_putting_a_key_again_does_not_count_it_twice() -> None:
    memory = Memory(1 << 20)
    memory.put(b"k", sized(100))
    memory.put(b"k", sized(200))
    assert (len(memory), memory.bytes) == (1, sized(200).bytes)
    memory.clear()
    assert (len(memory), memory.bytes) == (0, 0)


@pytest.mark.parametrize(
    "array",
    [
        np.float32([[1, np.nan]]),
        np.zeros((0, 3), np.int64),
        np.array(7, np.int8),
        np.bool_([True]),
        np.array([b"a", b""], np.object_),
    ],
    ids=lambda array: str(array.dtype),
)
def test_what_is_given_is_equal_bit_by_bit(array: Array) -> None:
    given = kept(array).give("other", "mine", 0.5)
    assert given.outputs["y"].dtype == array.dtype
    assert given.outputs["y"].shape == array.shape
    assert given.outputs["y"].tolist().__repr__() == array.tolist().__repr__()
    assert (given.model, given.id, given.timings) == ("other", "mine", {"cache": 0.5})


def test_no_caller_can_alter_what_another_is_given() -> None:
    source = np.float32([1, 2])
    numbers = kept(source)
    source[0] = 9
    first = numbers.give("m", None, 0.0)
    with pytest.raises(ValueError, match="read-only"):
        first.outputs["y"][0] = 5
    with pytest.raises(ValueError, match="WRITEABLE"):
        first.outputs["y"].flags.writeable = True
    first.outputs.pop("y")  # type: ignore[attr-defined]
    assert numbers.give("m", None, 0.0).outputs["y"].tolist() == [1, 2]

    texts = kept(np.array([b"a"], np.object_))
    texts.give("m", None, 0.0).outputs["y"][0] = b"b"
    assert texts.give("m", None, 0.0).outputs["y"].tolist() == [b"a"]


def test_an_output_that_has_no_wire_form_is_refused() -> None:
    with pytest.raises(InvalidRequest, match="output 'y'"):
        kept(np.array([3], np.object_))
