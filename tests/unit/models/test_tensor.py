from __future__ import annotations

import struct

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from models.errors import InvalidRequest, TooLarge
from models.tensor import (
    DTYPES,
    MAX_BYTES_ELEMENTS,
    Array,
    TensorSpec,
    check_tensor,
    datatype_of,
    decode_bytes,
    element_count,
    encode_bytes,
    shape_allows,
)


def test_every_protocol_datatype_maps_to_a_dtype_and_back() -> None:
    assert set(DTYPES) == {
        *("BOOL", "UINT8", "UINT16", "UINT32", "UINT64", "INT8", "INT16", "INT32", "INT64"),
        *("FP16", "FP32", "FP64", "BYTES"),
    }
    for name, dtype in DTYPES.items():
        assert datatype_of(dtype) == name


def test_text_arrays_are_bytes_and_complex_ones_are_refused() -> None:
    assert datatype_of(np.array(["a", "bc"]).dtype) == "BYTES"
    with pytest.raises(InvalidRequest, match="complex64"):
        datatype_of(np.dtype(np.complex64))


@pytest.mark.parametrize(
    ("wanted", "shape", "fits"),
    [((-1, 64), (5, 64), True), ((-1, 64), (5, 63), False), ((), (), True), ((2,), (2, 1), False), ((-1,), (0,), True)],
)
def test_minus_one_stands_for_any_size(wanted: tuple[int, ...], shape: tuple[int, ...], fits: bool) -> None:
    assert shape_allows(wanted, shape) is fits


@pytest.mark.parametrize(
    ("shape", "error"),
    [
        ([2, -1], InvalidRequest),
        ([1] * 17, InvalidRequest),
        ([1 << 40, 1 << 40], TooLarge),
        ([(1 << 28) + 1], TooLarge),
        ([0, 1 << 63], TooLarge),
        ([0, 1 << 28, 1 << 28, 1 << 28], TooLarge),
        ([10**4299, 10**4299], TooLarge),
        ([-(10**4299), -1], InvalidRequest),
    ],
)
def test_an_absurd_shape_is_refused_before_anything_is_allocated(shape: list[int], error: type[Exception]) -> None:
    with pytest.raises(error, match="input 'x'"):
        element_count(shape, "input 'x'")


def test_every_shape_that_is_accepted_can_be_made() -> None:
    for shape in ([0, 1 << 28], [1 << 14, 0, 1 << 14], [0] * 16):
        assert np.empty(shape).size == element_count(shape, "x") == 0


def test_a_tensor_of_another_dtype_or_shape_is_refused_naming_the_input() -> None:
    spec = TensorSpec("image", "FP32", (-1, 64))
    check_tensor(spec, np.zeros((3, 64), np.float32))
    with pytest.raises(InvalidRequest, match="input 'image': expected datatype FP32, got FP64"):
        check_tensor(spec, np.zeros((3, 64)))
    with pytest.raises(InvalidRequest, match=r"input 'image': expected shape \[-1, 64\], got \[64\]"):
        check_tensor(spec, np.zeros(64, np.float32))


@given(st.lists(st.binary(max_size=40), max_size=20))
def test_bytes_tensors_survive_the_round_trip(elements: list[bytes]) -> None:
    array = np.empty(len(elements), dtype=np.object_)
    array[:] = elements
    assert list(decode_bytes(encode_bytes(array, "x"), len(elements), "x")) == elements


@pytest.mark.parametrize(
    ("data", "count"),
    [
        (b"", 1),
        (struct.pack("<I", 5) + b"abc", 1),
        (struct.pack("<I", 1) + b"a", 2),
        (struct.pack("<I", 1) + b"ab", 1),
        (struct.pack("<I", 0xFFFFFFFF), 1),
        (b"abcdef", 1 << 16),
    ],
)
def test_bytes_lengths_that_do_not_add_up_are_refused(data: bytes, count: int) -> None:
    with pytest.raises(InvalidRequest, match="output 'y'"):
        decode_bytes(data, count, "output 'y'")


def test_more_bytes_elements_than_may_hold_up_the_loop_are_refused() -> None:
    count = MAX_BYTES_ELEMENTS + 1
    with pytest.raises(TooLarge, match="input 'x'"):
        decode_bytes(bytes(4 * count), count, "input 'x'")


@pytest.mark.parametrize("array", [np.array(["ä", "b"]), np.array(["ä".encode(), b"b"]), np.array(["ä", b"b"], object)])
def test_text_of_every_dtype_is_sent_as_text(array: Array) -> None:
    assert decode_bytes(encode_bytes(array, "x"), 2, "x").tolist() == ["ä".encode(), b"b"]


@pytest.mark.parametrize("element", [None, 1 << 40, -1, 0.5, ["a"], "\ud800"])
def test_an_element_that_is_no_text_is_refused_naming_it(element: object) -> None:
    array = np.empty(2, object)
    array[:] = [b"a", element]
    with pytest.raises(InvalidRequest, match="output 'y': element 1 "):
        encode_bytes(array, "output 'y'")
