"""Tensors as the Open Inference Protocol names them: datatypes, specifications, checks and the BYTES encoding.

A tensor in memory is a numpy array; BYTES is an object array of `bytes`. Source of the names and of the BYTES wire form:
Open Inference Protocol v2, "Tensor Data Types", and Triton's binary tensor data extension (little-endian, row-major,
each BYTES element preceded by its length as uint32).
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from math import prod
from typing import Any

import msgspec
import numpy as np

from models.errors import InvalidRequest, TooLarge

Array = np.ndarray[Any, np.dtype[Any]]

DTYPES: dict[str, np.dtype[Any]] = {
    "BOOL": np.dtype(np.bool_),
    "UINT8": np.dtype(np.uint8),
    "UINT16": np.dtype("<u2"),
    "UINT32": np.dtype("<u4"),
    "UINT64": np.dtype("<u8"),
    "INT8": np.dtype(np.int8),
    "INT16": np.dtype("<i2"),
    "INT32": np.dtype("<i4"),
    "INT64": np.dtype("<i8"),
    "FP16": np.dtype("<f2"),
    "FP32": np.dtype("<f4"),
    "FP64": np.dtype("<f8"),
    "BYTES": np.dtype(np.object_),
}
_NAMES = {dtype: name for name, dtype in DTYPES.items()} | {np.dtype(np.str_): "BYTES", np.dtype(np.bytes_): "BYTES"}

MAX_ELEMENTS = 1 << 28
"""Most elements one tensor may have (268 million). Checked before anything is allocated."""
MAX_RANK = 16
"""Most dimensions one tensor may have; every engine we carry stops earlier."""
MAX_BYTES_ELEMENTS = 1 << 16
"""Most BYTES elements of one request or answer. Each is a Python object of its own: reading this many takes some 25 ms."""


class TensorSpec(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One input or output: its name, Open Inference Protocol datatype, and shape where -1 means any size."""

    name: str
    datatype: str
    shape: tuple[int, ...]


def datatype_of(dtype: np.dtype[Any]) -> str:
    """The protocol's name of a numpy dtype. Raises InvalidRequest for one that the protocol cannot express."""
    name = _NAMES.get(dtype) or _NAMES.get(dtype.newbyteorder("<"))
    if name is None and dtype.kind in "SU":
        name = "BYTES"
    if name is None:
        raise InvalidRequest(f"dtype {dtype} has no Open Inference Protocol datatype")
    return name


def element_count(shape: Sequence[int], where: str) -> int:
    """Number of elements of a claimed shape, in exact integers, refused before any allocation when absurd.

    `where` names the tensor in the error. Raises InvalidRequest (negative or too many dims) or TooLarge.
    """
    if len(shape) > MAX_RANK:
        raise InvalidRequest(f"{where}: shape has {len(shape)} dimensions, at most {MAX_RANK} are accepted")
    for axis, dim in enumerate(shape):
        # Named by its index alone: a number of thousands of digits has no text form in Python.
        if dim < 0:
            raise InvalidRequest(f"{where}: axis {axis} of the shape is a negative dimension")
        if dim > MAX_ELEMENTS:
            raise TooLarge(f"{where}: axis {axis} of the shape has more than {MAX_ELEMENTS} elements")
    count = prod(shape)
    # An empty tensor's other dimensions must still multiply to something that numpy can express.
    if count > MAX_ELEMENTS or (count == 0 and prod(dim or 1 for dim in shape) > MAX_ELEMENTS):
        raise TooLarge(f"{where}: shape {list(shape)} spans more than {MAX_ELEMENTS} elements")
    return count


def check_tensor(spec: TensorSpec, array: Array) -> None:
    """Raise InvalidRequest, naming the input, unless `array` has the datatype and a shape that `spec` allows."""
    expected = DTYPES[spec.datatype]
    if array.dtype != expected:
        raise InvalidRequest(f"input '{spec.name}': expected datatype {spec.datatype}, got {datatype_of(array.dtype)}")
    if not shape_allows(spec.shape, array.shape):
        raise InvalidRequest(f"input '{spec.name}': expected shape {list(spec.shape)}, got {list(array.shape)}")


def shape_allows(wanted: Sequence[int], shape: Sequence[int]) -> bool:
    """Whether `shape` fits `wanted`, in which -1 stands for any size."""
    if len(wanted) != len(shape):
        return False
    return all(want in (-1, got) for want, got in zip(wanted, shape, strict=True))


def encode_bytes(array: Array, where: str) -> bytes:
    """BYTES tensor (dtype object, str or bytes) to its wire form. Raises InvalidRequest for an element that is no text."""
    parts = []
    for index, element in enumerate(array.reshape(-1)):
        data = bytes_of(element, where, index)
        parts.append(struct.pack("<I", len(data)))
        parts.append(data)
    return b"".join(parts)


def bytes_of(element: object, where: str, index: int) -> bytes:
    """One BYTES element, `str` as UTF-8. Raises InvalidRequest, naming the element, for anything but text and bytes."""
    if isinstance(element, str):
        try:
            return element.encode()
        except UnicodeEncodeError as error:
            raise InvalidRequest(f"{where}: element {index} holds half of a character and has no UTF-8 form") from error
    # Not bytes(anything): of an integer it makes that many zeros.
    if isinstance(element, bytes | bytearray | memoryview):
        return bytes(element)
    raise InvalidRequest(f"{where}: element {index} is of type {type(element).__name__}, neither text nor bytes")


def decode_bytes(data: bytes | memoryview, count: int, where: str) -> Array:
    """Wire form of a BYTES tensor to an object array [count] of `bytes`.

    Raises InvalidRequest when lengths do not add up, or TooLarge.
    """
    view = memoryview(data)
    if count > MAX_BYTES_ELEMENTS:
        raise TooLarge(f"{where}: more than {MAX_BYTES_ELEMENTS} BYTES elements are not accepted at once")
    # Every element costs at least its length prefix: checked before the array is made.
    if count * 4 > len(view):
        raise InvalidRequest(f"{where}: {count} BYTES elements need at least {count * 4} bytes, got {len(view)}")
    out = np.empty(count, dtype=np.object_)
    offset = 0
    for index in range(count):
        if offset + 4 > len(view):
            raise InvalidRequest(f"{where}: BYTES data ends inside the length of element {index}")
        (length,) = struct.unpack_from("<I", view, offset)
        offset += 4
        if offset + length > len(view):
            raise InvalidRequest(f"{where}: BYTES element {index} claims {length} bytes, {len(view) - offset} are left")
        out[index] = bytes(view[offset : offset + length])
        offset += length
    if offset != len(view):
        raise InvalidRequest(f"{where}: {len(view) - offset} bytes follow the last of {count} BYTES elements")
    return out
