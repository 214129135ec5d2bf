"""The messages of a session, between bytes and values. Pure.

A text message is JSON: {"op":"infer","id":"7","model":"m","request":{...}}, where `request` is an infer request as REST takes
it. A binary message is a 4-byte little-endian length, an envelope of that many bytes without `request`, and the body of a REST
infer request; the envelope's `header_length` counts the body's bytes of JSON, without it all of the body is JSON. Answers have
the form of their request, except that an answer with binary tensors is always a binary message.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping, Sequence
from math import isfinite

import msgspec

from models.errors import InvalidRequest, Overloaded, TierlineError, TooLarge
from models.serving.codec import MAX_JSON_BYTES
from models.serving.codec_tensor import DECODE_ERRORS

MAX_ENVELOPE_BYTES = 16 * 1024
"""Longest envelope without its request: names, an id and numbers."""
MAX_TEXT_BYTES = MAX_JSON_BYTES + MAX_ENVELOPE_BYTES
"""Longest text message; tensors that do not fit belong into a binary one."""
MAX_ID_CHARACTERS = 256
"""Longest id; it is kept for as long as its request is in flight."""
CANCELLED = 499
"""Status of a request that its caller has taken back: nginx's number for a client that closed its request."""

_LENGTH = struct.Struct("<I")


class Envelope(msgspec.Struct):
    """What a client asks. `deadline_ms`: remaining milliseconds; `traceparent`: W3C; `body`: what a REST request would hold."""

    op: str
    id: str = ""
    model: str = ""
    version: str | None = None
    job: str = ""
    deadline_ms: float | None = None
    traceparent: str | None = None
    header_length: int | None = None
    request: msgspec.Raw = msgspec.Raw()

    @property
    def budget(self) -> float | None:
        """Seconds, None = the policy's default."""
        return None if self.deadline_ms is None else self.deadline_ms / 1e3


class _Answer(msgspec.Struct, omit_defaults=True):
    op: str
    id: str
    response: msgspec.Raw = msgspec.Raw()
    header_length: int | None = None
    traceparent: str | None = None


_DECODER = msgspec.json.Decoder(Envelope)
_ENCODER = msgspec.json.Encoder()


def read_text(data: bytes) -> tuple[Envelope, bytes]:
    """A text message and the infer request in it. Raises InvalidRequest."""
    envelope = _checked(data)
    if envelope.header_length is not None:
        raise InvalidRequest("header_length belongs into a binary message")
    return envelope, bytes(envelope.request)


def read_binary(data: bytes) -> tuple[Envelope, bytes]:
    """A binary message and the infer request in it. Raises InvalidRequest, TooLarge."""
    if len(data) < _LENGTH.size:
        raise InvalidRequest("a binary message begins with the length of its envelope, in 4 bytes")
    (length,) = _LENGTH.unpack_from(data)
    if length > MAX_ENVELOPE_BYTES:
        raise TooLarge(f"an envelope of {length} bytes, at most {MAX_ENVELOPE_BYTES} are accepted")
    end = _LENGTH.size + length
    if end > len(data):
        raise InvalidRequest(f"an envelope of {length} bytes in a message of {len(data)}")
    envelope = _checked(data[_LENGTH.size : end])
    if bytes(envelope.request):
        raise InvalidRequest("the request of a binary message follows its envelope")
    return envelope, data[end:]


def answer_text(request_id: str, body: Sequence[bytes], trace: str | None = None) -> bytes:
    """An answer without binary tensors, `body` as `encode_response` gives it."""
    return _ENCODER.encode(_Answer("answer", request_id, response=msgspec.Raw(b"".join(body)), traceparent=trace))


def answer_binary(request_id: str, body: Sequence[bytes], header_length: int | None, trace: str | None = None) -> bytes:
    """An answer as a binary message, `body` and `header_length` as `encode_response` gives them."""
    envelope = _ENCODER.encode(_Answer("answer", request_id, header_length=header_length, traceparent=trace))
    return b"".join((_LENGTH.pack(len(envelope)), envelope, *body))


def error_text(request_id: str, error: TierlineError) -> bytes:
    """A refusal, with the status that REST would give it; `request_id` "" = the message had none that could be read."""
    told: dict[str, object] = {
        "op": "error",
        "id": request_id or None,
        "status": error.http,
        "error": _clean(str(error)),
    }
    if isinstance(error, Overloaded):
        told["retry_after"] = error.retry_after
    return _ENCODER.encode(told)


def cancelled_text(request_id: str) -> bytes:
    """What a request that was taken back ends with."""
    return _ENCODER.encode({"op": "error", "id": request_id, "status": CANCELLED, "error": "cancelled by the caller"})


def news_text(op: str, **fields: object) -> bytes:
    """A message that answers no infer request: "model", "job" or "pong"."""
    return _ENCODER.encode({"op": op, **fields})


def id_of(data: bytes) -> str:
    """The id of a text message that could not be used, "" when it has none."""
    if len(data) > MAX_ENVELOPE_BYTES:
        return ""
    try:
        found = msgspec.json.decode(data, type=Mapping[str, msgspec.Raw]).get("id")
        return "" if found is None else msgspec.json.decode(found, type=str)[:MAX_ID_CHARACTERS]
    except DECODE_ERRORS:
        return ""


def _checked(data: bytes) -> Envelope:
    try:
        envelope = _DECODER.decode(data)
    except DECODE_ERRORS as error:
        raise InvalidRequest(f"message is not valid: {error}") from error
    if len(envelope.id) > MAX_ID_CHARACTERS:
        raise InvalidRequest(f"id has {len(envelope.id)} characters, at most {MAX_ID_CHARACTERS} are accepted")
    if envelope.deadline_ms is not None and not isfinite(envelope.deadline_ms):
        raise InvalidRequest("deadline_ms is not a number of milliseconds")
    return envelope


def _clean(message: str) -> str:
    # A surrogate that came out of a broken name cannot be encoded.
    return message.encode("utf-8", "replace").decode()
