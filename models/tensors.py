"""Where the weights lie in a model file: byte ranges, read off the file's own structure. Pure; loads no framework.

ONNX is protobuf (onnx.proto3: ModelProto.graph = 7, GraphProto.node = 1, .initializer = 5, NodeProto.attribute = 5,
AttributeProto.t = 5 and .g = 6, TensorProto.raw_data = 9); a .tflite file is a flatbuffer (schema.fbs: Model.buffers is
field 4, Buffer.data field 0). The ranges are a hint to whoever compares two files: a file that lies about them gains nothing.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator

MIN_TENSOR_BYTES = 512
"""Smaller ones are not worth a range of their own."""
MAX_TENSORS = 100_000
MAX_DEPTH = 12
"""Messages within messages: a graph within a node's attribute is four levels."""

Span = tuple[int, int]
"""First byte and the byte behind the last."""

_TFLITE = b"TFL3"
_RAW_DATA = 9
# Which fields of which message lead to tensors: message -> field -> message.
_ONNX = {
    "model": {7: "graph"},
    "graph": {1: "node", 5: "tensor"},
    "node": {5: "attribute"},
    "attribute": {5: "tensor", 6: "graph"},
    "tensor": {},
}


class _Unreadable(Exception):
    """It is no such file, or a damaged one."""


def tensor_spans(data: memoryview) -> list[Span]:
    """Disjoint ranges of weights, ascending; [] for a file of a kind that is not known, or that is damaged."""
    try:
        read = _tflite if bytes(data[4:8]) == _TFLITE else _onnx
        spans = sorted(span for span in read(data) if span[1] - span[0] >= MIN_TENSOR_BYTES)
    except (_Unreadable, struct.error):
        return []
    found: list[Span] = []
    for start, end in spans[:MAX_TENSORS]:
        if not found or start >= found[-1][1]:
            found.append((start, end))
    return found


def _onnx(data: memoryview) -> list[Span]:
    found: list[Span] = []
    waiting = [("model", 0, len(data), 0)]
    while waiting:
        message, start, end, depth = waiting.pop()
        if depth > MAX_DEPTH or len(found) > MAX_TENSORS:
            raise _Unreadable
        for field, first, last in _fields(data, start, end):
            inner = _ONNX[message].get(field)
            if message == "tensor" and field == _RAW_DATA:
                found.append((first, last))
            elif inner is not None:
                waiting.append((inner, first, last, depth + 1))
    return found


def _fields(data: memoryview, at: int, end: int) -> Iterator[tuple[int, int, int]]:
    """Field number, first byte and end of every length-delimited field (protobuf wire type 2); others are passed over."""
    while at < end:
        tag, at = _varint(data, at, end)
        kind = tag & 7
        if kind == 0:
            _, at = _varint(data, at, end)
        elif kind == 1:
            at += 8
        elif kind == 5:
            at += 4
        elif kind == 2:
            length, at = _varint(data, at, end)
            if length > end - at:
                raise _Unreadable
            yield tag >> 3, at, at + length
            at += length
        else:
            raise _Unreadable
    if at != end:
        raise _Unreadable


def _varint(data: memoryview, at: int, end: int) -> tuple[int, int]:
    value = 0
    for shift in range(0, 70, 7):
        if at >= end:
            raise _Unreadable
        byte = data[at]
        at += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, at
    raise _Unreadable


def _tflite(data: memoryview) -> list[Span]:
    (model,) = struct.unpack_from("<I", data, 0)
    vector = _field(data, model, 4)
    if vector is None:
        return []
    (count,) = struct.unpack_from("<I", data, vector)
    if count > MAX_TENSORS:
        raise _Unreadable
    found = []
    for index in range(count):
        at = vector + 4 + 4 * index
        (offset,) = struct.unpack_from("<I", data, at)
        content = _field(data, at + offset, 0)
        if content is not None:
            (length,) = struct.unpack_from("<I", data, content)
            if length > len(data) - content - 4:
                raise _Unreadable
            found.append((content + 4, content + 4 + length))
    return found


def _field(data: memoryview, table: int, number: int) -> int | None:
    """Where an offset field of a flatbuffer table points to; None when it is absent."""
    (back,) = struct.unpack_from("<i", data, table)
    vtable = table - back
    if vtable < 0:
        raise _Unreadable
    (size,) = struct.unpack_from("<H", data, vtable)
    if size < 6 + 2 * number:
        return None
    (relative,) = struct.unpack_from("<H", data, vtable + 4 + 2 * number)
    if not relative:
        return None
    (offset,) = struct.unpack_from("<I", data, table + relative)
    return int(table + relative + offset)
