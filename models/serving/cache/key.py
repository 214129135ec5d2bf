"""What makes two requests the same question: the model's digest, the inputs' exact bits, the outputs wanted and the tenant.

The encoding is canonical and unambiguous: every part is preceded by its length or count, so that no two questions have one
encoding; its sha256 is the key. Numbers count by their bits: 0.0 and -0.0, or two NaNs, are different inputs.
"""

from __future__ import annotations

import asyncio
import struct
from collections.abc import Sequence
from hashlib import sha256

import numpy as np

from models.serving.predictor import InferRequest
from models.tensor import Array

INLINE_BYTES = 256 * 1024
"""Most input bytes that are hashed in the event loop (some 0.15 ms); larger ones are hashed in a thread."""
MAX_INPUT_BYTES = 16 * 1024 * 1024
"""Largest inputs that are looked up at all: hashing more costs as much as many models do."""
_COPY_BYTES = 4096
"""Up to here a copy is cheaper than a view."""

_U32 = struct.Struct("<I").pack
_U64 = struct.Struct("<Q").pack
_TEXT, _BINARY = b"s", b"b"


async def request_key(digest: bytes, request: InferRequest) -> bytes | None:
    """32 bytes, equal exactly for equal questions to the model called `digest`. None = not to be cached.

    Suspends only for inputs above 256 KiB. Elements of BYTES inputs count one by one, `str` apart from `bytes`.
    """
    size = sum([array.nbytes for array in request.inputs.values()])
    if size > MAX_INPUT_BYTES:
        return None
    if size <= INLINE_BYTES:
        return key_of(digest, request)
    return await asyncio.get_running_loop().run_in_executor(None, key_of, digest, request)


def key_of(digest: bytes, request: InferRequest) -> bytes | None:
    """As `request_key`, here and now whatever the size."""
    tenant = request.tenant
    inputs = request.inputs
    outputs = request.outputs
    head = [_U32(len(digest)), digest, b"\0" if tenant is None else b"\1" + _text(tenant), _U32(len(outputs))]
    head += [_text(name) for name in outputs]
    head.append(_U32(len(inputs)))
    state = sha256(b"".join(head))
    for name in inputs if len(inputs) == 1 else sorted(inputs):
        array = inputs[name]
        shape = array.shape
        state.update(_text(name) + _text(array.dtype.str) + struct.pack(f"<I{len(shape)}Q", len(shape), *shape))
        if array.dtype.kind == "O":
            encoded = _elements(array)
            if encoded is None:
                return None
            state.update(encoded)
        else:
            state.update(_bits(array))
    return state.digest()


def _text(value: str) -> bytes:
    # A lone surrogate has no UTF-8 form, and must not fail here.
    data = value.encode("utf-8", "surrogatepass")
    return _U32(len(data)) + data


def _bits(array: Array) -> bytes | memoryview:
    """The array's bytes, row-major; dtype and shape already say how many."""
    if array.nbytes <= _COPY_BYTES or not array.flags.c_contiguous:
        return array.tobytes()
    return array.reshape(-1).view(np.uint8).data


def _elements(array: Array) -> bytes | None:
    """BYTES elements in row-major order: kinds, lengths, then contents. None when one is neither text nor bytes."""
    elements: Sequence[object] = array.reshape(-1).tolist()
    kinds, parts = [], []
    for element in elements:
        if isinstance(element, str):
            kinds.append(_TEXT)
            parts.append(element.encode("utf-8", "surrogatepass"))
        elif isinstance(element, bytes | bytearray | memoryview):
            kinds.append(_BINARY)
            parts.append(bytes(element))
        else:
            return None
    lengths = b"".join([_U64(len(part)) for part in parts])
    return b"".join((b"".join(kinds), lengths, *parts))
