"""Tensors that came as typed `contents`, and those that came raw, as arrays. Pure.

Values that the datatype cannot hold are refused, never wrapped. Source: Open Inference Protocol v2, "InferTensorContents".
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from models.errors import InvalidRequest, TooLarge
from models.serving.codec_tensor import view_binary
from models.tensor import DTYPES, MAX_BYTES_ELEMENTS, Array, element_count

MAX_TYPED_VALUES = 1 << 19
"""Most typed values of one request: making arrays of this many takes some 30 ms, in which every other caller waits."""

# datatype -> (field of InferTensorContents, dtype of its values)
_FIELDS: dict[str, tuple[str, Any]] = {
    "BOOL": ("bool_contents", np.bool_),
    "INT8": ("int_contents", np.int32),
    "INT16": ("int_contents", np.int32),
    "INT32": ("int_contents", np.int32),
    "INT64": ("int64_contents", np.int64),
    "UINT8": ("uint_contents", np.uint32),
    "UINT16": ("uint_contents", np.uint32),
    "UINT32": ("uint_contents", np.uint32),
    "UINT64": ("uint64_contents", np.uint64),
    "FP32": ("fp32_contents", np.float32),
    "FP64": ("fp64_contents", np.float64),
    "BYTES": ("bytes_contents", np.object_),
}


def typed_tensor(contents: Any, datatype: str, shape: Sequence[int], where: str, room: int) -> Array:
    """An InferTensorContents as an array of `shape`. `where` names the tensor, `room`: values the request may still have.

    Raises InvalidRequest or TooLarge.
    """
    if datatype == "FP16":
        raise InvalidRequest(f"{where}: FP16 has no typed contents in the protocol, send it as raw_input_contents")
    count = element_count(shape, where)
    field, wide = _FIELDS[datatype]
    for other, _ in contents.ListFields():
        if other.name != field:
            raise InvalidRequest(f"{where}: {datatype} belongs into {field}, not into {other.name}")
    values = getattr(contents, field)
    if len(values) != count:
        raise InvalidRequest(f"{where}: shape {list(shape)} needs {count} elements, {field} has {len(values)}")
    if count > room:
        raise TooLarge(
            f"{where}: more than {MAX_TYPED_VALUES} typed values are not accepted in one request: "
            "send the tensors as raw_input_contents, or fewer at once"
        )
    if datatype == "BYTES" and count > MAX_BYTES_ELEMENTS:
        raise TooLarge(f"{where}: more than {MAX_BYTES_ELEMENTS} BYTES elements are not accepted at once")
    array = np.fromiter(values, wide, count)
    dtype = DTYPES[datatype]
    if dtype.itemsize < array.dtype.itemsize:
        _check_range(array, datatype, shape, where)
    return array.astype(dtype, copy=False).reshape(shape)


def raw_tensor(
    data: bytes, index: int, place: tuple[int, int], datatype: str, shape: Sequence[int], where: str
) -> Array:
    """One of `raw_input_contents`, which lies in `data` at `place`, as a read-only view (except BYTES).

    Raises InvalidRequest unless size and shape agree exactly, or TooLarge.
    """
    offset, size = place
    itemsize = DTYPES[datatype].itemsize
    if datatype != "BYTES" and element_count(shape, where) * itemsize != size:
        raise InvalidRequest(
            f"{where}: shape {list(shape)} of {datatype} takes {element_count(shape, where) * itemsize} bytes, "
            f"raw_input_contents[{index}] has {size}"
        )
    return view_binary(data, offset, size, datatype, shape, where)


def _check_range(array: Array, datatype: str, shape: Sequence[int], where: str) -> None:
    limits = np.iinfo(DTYPES[datatype])
    outside = np.flatnonzero((array < limits.min) | (array > limits.max))
    if outside.size:
        index = int(outside[0])
        place = [int(axis) for axis in np.unravel_index(index, tuple(shape))]
        raise InvalidRequest(
            f"{where}: element {place} is {array[index]}, outside {datatype} ({limits.min} to {limits.max})"
        )
