"""An answer as bytes for a cache that several processes share, and back. Pure.

Form: `TLC1`, a keyed BLAKE2b-128 checksum, then a msgpack array. The checksum is keyed with the cache key, so that a value
which was cut, altered or stored under another key is no value. It guards against accidents: whoever may write to the store
may write answers.
"""

from __future__ import annotations

from hashlib import blake2b

import msgspec

from models.errors import TierlineError
from models.serving.codec_tensor import encode_binary, view_binary
from models.serving.predictor import InferResponse
from models.tensor import datatype_of

MAGIC = b"TLC1"
_CHECKSUM_BYTES = 16


class _Tensor(msgspec.Struct, array_like=True):
    name: str
    datatype: str
    shape: tuple[int, ...]
    data: bytes


class _Record(msgspec.Struct, array_like=True):
    model: str
    package: str
    version: str
    tier: str
    confidence: float | None
    reason: str
    outputs: list[_Tensor]


_ENCODER = msgspec.msgpack.Encoder()
_DECODER = msgspec.msgpack.Decoder(_Record)


class CorruptRecord(Exception):
    """The bytes are not an answer stored under this key."""


def encode_record(key: bytes, answer: InferResponse) -> bytes:
    """`key`: 32 bytes. Raises InvalidRequest for an output that the protocol cannot express."""
    tensors = [
        _Tensor(name, datatype_of(array.dtype), array.shape, encode_binary(array, f"output '{name}'"))
        for name, array in answer.outputs.items()
    ]
    record = _Record(
        answer.model, answer.package, answer.version, answer.tier, answer.confidence, answer.reason, tensors
    )
    payload = _ENCODER.encode(record)
    return MAGIC + _checksum(key, payload) + payload


def decode_record(key: bytes, data: bytes) -> InferResponse:
    """What `encode_record` was given, arrays bit by bit, without timings and id. Raises CorruptRecord."""
    head = len(MAGIC) + _CHECKSUM_BYTES
    payload = data[head:]
    if data[:head] != MAGIC + _checksum(key, payload):
        raise CorruptRecord("the checksum does not fit")
    try:
        record = _DECODER.decode(payload)
        outputs = {
            tensor.name: view_binary(tensor.data, 0, len(tensor.data), tensor.datatype, tensor.shape, tensor.name)
            for tensor in record.outputs
        }
    except (msgspec.MsgspecError, UnicodeDecodeError, TierlineError) as error:
        raise CorruptRecord(str(error)) from error
    return InferResponse(
        outputs=outputs,
        model=record.model,
        package=record.package,
        version=record.version,
        tier=record.tier,
        confidence=record.confidence,
        reason=record.reason,
    )


def _checksum(key: bytes, payload: bytes) -> bytes:
    return blake2b(payload, digest_size=_CHECKSUM_BYTES, key=key).digest()
