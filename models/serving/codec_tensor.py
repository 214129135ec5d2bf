"""Tensors of the Open Inference Protocol to arrays and back, as JSON data and as binary data. Both sides use it. Pure.

Sources: Open Inference Protocol v2, "Tensor Data"; Triton's binary tensor data extension. JSON data is read flat first and
nested second, both row-major. Values that the datatype cannot hold are refused, never wrapped, rounded or truncated.
"""

from __future__ import annotations

import platform
import re
from collections.abc import Sequence
from functools import lru_cache
from types import GenericAlias
from typing import Annotated, Any

import msgspec
import numpy as np

from models.errors import InvalidRequest
from models.tensor import DTYPES, Array, bytes_of, datatype_of, decode_bytes, element_count, encode_bytes

_FP32_END = 2.0**128 - 2.0**103
"""The smallest number that rounds to infinity in binary32 (IEEE 754, round to nearest even)."""
_ELEMENTS: dict[str, Any] = dict.fromkeys(DTYPES, int) | {
    "BOOL": bool,
    "FP32": Annotated[float, msgspec.Meta(gt=-_FP32_END, lt=_FP32_END)],
    "FP64": float,
    "BYTES": str,
}
_AS_IT_IS = frozenset(dtype for name, dtype in DTYPES.items() if name != "BYTES")
_NESTED = re.compile(rb"\s*\[\s*\[")
# A tensor starts wherever the JSON before it ends. x86 reads unaligned numbers at full speed, other processors may trap.
_READS_UNALIGNED = platform.machine() in ("x86_64", "AMD64")

View = tuple[str, tuple[int, ...], np.dtype[Any], int]
"""A tensor's name, shape and dtype, and where in the body its bytes begin."""

DECODE_ERRORS = (msgspec.MsgspecError, UnicodeDecodeError, RecursionError)
"""What msgspec raises for bytes that are not the JSON that was asked for: wrong type, broken UTF-8, absurd nesting."""


def decode_json(raw: msgspec.Raw, datatype: str, shape: Sequence[int], where: str) -> Array:
    """JSON `data` as an array of `shape`. `where` names the tensor. Raises InvalidRequest, with the index of a bad element."""
    dtype = _dtype(datatype, where)
    count = element_count(shape, where)
    if datatype == "FP16":
        raise InvalidRequest(f"{where}: FP16 has no JSON form in the protocol, send it as binary data")
    try:
        values = _decoder(datatype, 1).decode(raw)
    except DECODE_ERRORS as error:
        if not _NESTED.match(raw):
            raise _bad_data(where, error) from error
        values = _flatten(_decode_nested(raw, datatype, shape, where), shape, where)
    if len(values) != count:
        raise InvalidRequest(f"{where}: shape {list(shape)} needs {count} elements, data has {len(values)}")
    if datatype == "BYTES":
        values = [bytes_of(value, where, index) for index, value in enumerate(values)]
    try:
        return np.array(values, dtype).reshape(shape)
    except OverflowError as error:
        raise InvalidRequest(f"{where}: {_out_of_range(values, datatype, shape)}") from error


def view_binary(body: bytes, offset: int, size: int, datatype: str, shape: Sequence[int], where: str) -> Array:
    """`size` bytes of `body` from `offset` on as a read-only array of `shape`, without a copy (except BYTES).

    Raises InvalidRequest unless size and shape agree exactly and the bytes are there, or TooLarge.
    """
    dtype = _dtype(datatype, where)
    count = element_count(shape, where)
    if size < 0 or offset + size > len(body):
        raise InvalidRequest(f"{where}: binary_data_size is {size}, {len(body) - offset} bytes are left in the body")
    if datatype == "BYTES":
        return decode_bytes(memoryview(body)[offset : offset + size], count, where).reshape(shape)
    if count * dtype.itemsize != size:
        raise InvalidRequest(
            f"{where}: shape {list(shape)} of {datatype} takes {count * dtype.itemsize} bytes, binary_data_size is {size}"
        )
    if count == 0:
        return np.empty(shape, dtype)
    if datatype == "BOOL" and np.frombuffer(body, np.uint8, count, offset).max() > 1:
        raise InvalidRequest(f"{where}: a BOOL byte is neither 0 nor 1")
    array = np.frombuffer(body, dtype, count, offset).reshape(shape)
    if not _READS_UNALIGNED and not array.flags.aligned:
        return array.copy()
    return array


def view_of(name: str, datatype: str, shape: Sequence[int], offset: int, size: int) -> View | None:
    """The view for `view_again` of a tensor that `view_binary` accepted. None when its bytes must be looked at each time."""
    dtype = DTYPES[datatype]
    # The data of a bytes object begins aligned for every datatype.
    aligned = _READS_UNALIGNED or offset % dtype.itemsize == 0
    return (name, tuple(shape), dtype, offset) if size and aligned and datatype not in ("BOOL", "BYTES") else None


def view_again(body: bytes, views: Sequence[View]) -> dict[str, Array]:
    """Read-only arrays of a body laid out exactly as the one that `views` was made for."""
    return {name: np.ndarray(shape, dtype, body, offset) for name, shape, dtype, offset in views}


def encode_binary(array: Array, where: str) -> bytes:
    """The binary form, row-major and little-endian. Raises InvalidRequest for what the protocol cannot express."""
    if array.dtype in _AS_IT_IS:
        return array.tobytes()
    if array.dtype.kind in "OSU":
        return encode_bytes(array, where)
    return array.astype(DTYPES[datatype_of(array.dtype)], copy=False).tobytes()


def _dtype(datatype: str, where: str) -> np.dtype[Any]:
    dtype = DTYPES.get(datatype)
    if dtype is None:
        raise InvalidRequest(f"{where}: datatype {datatype!r} is none of {', '.join(DTYPES)}")
    return dtype


@lru_cache(maxsize=256)  # bounded by construction: datatypes x MAX_RANK
def _decoder(datatype: str, depth: int) -> msgspec.json.Decoder[Any]:
    wanted = _ELEMENTS[datatype]
    for _ in range(depth):
        wanted = GenericAlias(list, (wanted,))
    return msgspec.json.Decoder(wanted)


def _decode_nested(raw: msgspec.Raw, datatype: str, shape: Sequence[int], where: str) -> Any:
    if len(shape) < 2:
        raise InvalidRequest(f"{where}: data is nested, its shape {list(shape)} is not")
    try:
        return _decoder(datatype, len(shape)).decode(raw)
    except DECODE_ERRORS as error:
        raise _bad_data(where, error) from error


def _flatten(values: list[Any], shape: Sequence[int], where: str) -> list[Any]:
    """Nested lists to one flat list, refused unless every one has exactly the length its axis says."""
    rows = [values]
    for axis, length in enumerate(shape):
        for row in rows:
            if len(row) != length:
                raise InvalidRequest(
                    f"{where}: data does not have shape {list(shape)}: {len(row)} elements where axis {axis} has {length}"
                )
        if axis < len(shape) - 1:
            rows = [row for outer in rows for row in outer]
    return [value for row in rows for value in row]


def _out_of_range(values: list[int], datatype: str, shape: Sequence[int]) -> str:
    limits = np.iinfo(DTYPES[datatype])
    worst = max(values)
    index = values.index(worst if worst > limits.max else min(values))
    place = [int(axis) for axis in np.unravel_index(index, tuple(shape))] if len(shape) > 1 else [index]
    return f"element {place} is {values[index]}, outside {datatype} ({limits.min} to {limits.max})"


def _bad_data(where: str, error: Exception) -> InvalidRequest:
    return InvalidRequest(f"{where}: data: {error}")
