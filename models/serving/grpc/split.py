"""The bytes of a ModelInferRequest cut apart before protobuf sees them. Pure.

Tensors sent as `raw_input_contents` stay where they are, so arrays can be views of the message without a copy, and the rest,
which is small and often the same again, can be recognised. It also keeps protobuf from making objects without end: two bytes
on the wire can cost it a hundred in memory.
Source: Protocol Buffers documentation, "Encoding".
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from models.errors import InvalidRequest, TooLarge

MAX_HEAD_BYTES = 4 * 1024 * 1024
"""Most bytes beside `raw_input_contents`: as much as JSON may have over HTTP. Protobuf reads them in one go."""
MAX_FIELDS = 2048
"""Most fields of one message, tensors included: eight for each of the inputs that a request may have."""

_ID = 3 << 3 | 2
_RAW = 7 << 3 | 2
_BYTES = 2
_MAX_VARINT = 10
"""Bytes of the longest varint."""

Place = tuple[int, int]
"""Where in the message the bytes of a field begin, and how many they are."""


class Split(NamedTuple):
    """`head`: the message without its id and its raw tensors. `raws`: where those lie."""

    head: bytes
    id: str | None
    raws: list[Place]


def split_request(data: bytes) -> Split:
    """Raises InvalidRequest for what cannot be a message, or TooLarge."""
    raws: list[Place] = []
    kept: list[bytes] = []
    named: Place | None = None
    start = position = 0
    try:
        for tag, field, position, length in _fields(data):
            if tag in (_RAW, _ID):
                kept.append(data[start:field])
                start = position + length
                if tag == _RAW:
                    raws.append((position, length))
                else:
                    named = position, length
    except IndexError as error:
        raise _not_a_message() from error
    kept.append(data[start:])
    head = b"".join(kept)
    if len(head) > MAX_HEAD_BYTES:
        raise TooLarge(
            f"{len(head)} bytes beside raw_input_contents, at most {MAX_HEAD_BYTES} are accepted: "
            "send the tensors as raw_input_contents, or fewer at once"
        )
    return Split(head, None if named is None else _text(data, named), raws)


def _fields(data: bytes) -> Iterator[tuple[int, int, int, int]]:
    """Of each field its tag, where the tag is, where the bytes begin and how many they are.

    Raises IndexError when `data` ends before a field does.
    """
    position, end = 0, len(data)
    for _ in range(MAX_FIELDS):
        if position == end:
            return
        field = position
        tag = data[position]
        if tag & 7 == _BYTES and tag < 0x80:
            length = data[position + 1]
            position += 2
            if length >= 0x80:
                length, position = _varint(data, position - 1)
        else:
            tag, length, position = _foreign(data, position)
        if position + length > end:
            raise IndexError
        yield tag, field, position, length
        position += length
    if position < end:
        raise TooLarge(f"the message has more than {MAX_FIELDS} fields")


def _text(data: bytes, place: Place) -> str | None:
    offset, size = place
    try:
        return data[offset : offset + size].decode() or None
    except UnicodeDecodeError as error:
        raise InvalidRequest("id is not UTF-8 text") from error


def bytes_prefix(number: int, length: int) -> bytes:
    """What is written before the `length` bytes of field `number`."""
    return _encode_varint(number << 3 | _BYTES) + _encode_varint(length)


def _varint(data: bytes, position: int) -> tuple[int, int]:
    """The number at `position`, and where it ends. Raises IndexError at the end of `data`."""
    value = 0
    for index in range(_MAX_VARINT):
        byte = data[position + index]
        value |= (byte & 0x7F) << (7 * index)
        if byte < 0x80:
            return value, position + index + 1
    raise _not_a_message()


def _foreign(data: bytes, position: int) -> tuple[int, int, int]:
    """A field that is none of ours: its tag, how many bytes it has, and where they begin."""
    tag, position = _varint(data, position)
    match tag & 7:
        case 0:
            return tag, 0, _varint(data, position)[1]
        case 1:
            return tag, 8, position
        case 2:
            return tag, *_varint(data, position)
        case 5:
            return tag, 4, position
    raise _not_a_message()


def _not_a_message() -> InvalidRequest:
    return InvalidRequest("the message is not a ModelInferRequest")


def _encode_varint(value: int) -> bytes:
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    out.append(value)
    return bytes(out)
