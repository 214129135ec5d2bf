"""Frames between a session and its child process: a header in MessagePack, then the tensors' bytes, on a stream socket.

What comes from the child is a stranger's: every length is checked before memory is made for it.
"""

from __future__ import annotations

import socket
import struct
from collections.abc import Mapping, Sequence

import msgspec
import numpy as np

from models.errors import TierlineError
from models.tensor import DTYPES, Array, datatype_of, decode_bytes, element_count, encode_bytes

MAX_HEADER_BYTES = 1 << 20
"""Names and shapes of 1,000 tensors are a tenth of this."""
MAX_FRAME_BYTES = 1 << 30
"""Tensors of one frame (1 GiB)."""
_LENGTH = struct.Struct("<I")


class Tensor(msgspec.Struct, frozen=True, array_like=True):
    """What stands in the header of one tensor; its `size` bytes follow the header in the same order."""

    name: str
    datatype: str
    shape: tuple[int, ...]
    size: int


class Frame(msgspec.Struct, frozen=True, array_like=True):
    """`error`: "" = none; "engine" or "request" tell an EngineFailure from an InvalidRequest, its text is `reason`."""

    tensors: tuple[Tensor, ...] = ()
    outputs: tuple[str, ...] = ()
    error: str = ""
    reason: str = ""


_ENCODER = msgspec.msgpack.Encoder()
_DECODER = msgspec.msgpack.Decoder(Frame)


class BrokenFrame(Exception):
    """The other side closed the stream or sent what is no frame."""


def send(
    stream: socket.socket,
    arrays: Mapping[str, Array],
    outputs: Sequence[str] = (),
    *,
    error: str = "",
    reason: str = "",
) -> None:
    """Send one frame. Raises OSError; InvalidRequest for a BYTES element that is no text."""
    parts, tensors = [], []
    for name, array in arrays.items():
        datatype = datatype_of(array.dtype)
        data = encode_bytes(array, f"'{name}'") if datatype == "BYTES" else _bytes_of(array)
        parts.append(data)
        tensors.append(Tensor(name, datatype, array.shape, len(data)))
    header = _ENCODER.encode(Frame(tuple(tensors), tuple(outputs), error, reason))
    stream.sendall(_LENGTH.pack(len(header)) + header)
    for data in parts:
        stream.sendall(data)


def _bytes_of(array: Array) -> memoryview:
    return np.ascontiguousarray(array).reshape(-1).view(np.uint8).data


def receive(stream: socket.socket) -> tuple[Frame, dict[str, Array]]:
    """The next frame, its arrays fresh and writable. Raises BrokenFrame; OSError, of which TimeoutError is one."""
    (length,) = _LENGTH.unpack(_exactly(stream, _LENGTH.size))
    if length > MAX_HEADER_BYTES:
        raise BrokenFrame(f"a header of {length} bytes")
    try:
        frame = _DECODER.decode(_exactly(stream, length))
    except msgspec.MsgspecError as error:
        raise BrokenFrame("the header does not decode") from error
    if sum(tensor.size for tensor in frame.tensors) > MAX_FRAME_BYTES:
        raise BrokenFrame("more bytes of tensors than are accepted")
    return frame, {tensor.name: _array(stream, tensor) for tensor in frame.tensors}


def _array(stream: socket.socket, tensor: Tensor) -> Array:
    dtype = DTYPES.get(tensor.datatype)
    try:
        count = element_count(tensor.shape, tensor.name)
        if dtype is None or not 0 <= tensor.size <= MAX_FRAME_BYTES:
            raise BrokenFrame("a tensor that is none")
        if tensor.datatype == "BYTES":
            return decode_bytes(_exactly(stream, tensor.size), count, tensor.name).reshape(tensor.shape)
    except TierlineError as error:
        raise BrokenFrame(str(error)) from error
    if count * dtype.itemsize != tensor.size:
        raise BrokenFrame(f"{tensor.size} bytes for a tensor of {count} elements")
    array = np.empty(tensor.shape, dtype)
    if count:
        _fill(stream, array.reshape(-1).view(np.uint8).data)
    return array


def _exactly(stream: socket.socket, size: int) -> bytes:
    data = bytearray(size)
    _fill(stream, memoryview(data))
    return bytes(data)


def _fill(stream: socket.socket, view: memoryview) -> None:
    while view.nbytes:
        got = stream.recv_into(view)
        if not got:
            raise BrokenFrame("the stream was closed")
        view = view[got:]
