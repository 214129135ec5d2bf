"""The client's half of Open Inference Protocol v2: `InferRequest` to request bytes, response bytes to an answer. Pure.

Tensors travel as binary data in both directions; answers in JSON are read as well. A program sends the same shapes again and
again: the JSON before the tensors is remembered in both directions, by what it was made of.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from typing import Any

import msgspec

from models.errors import CallerError, InvalidRequest, Unreachable
from models.serving.codec_tensor import (
    DECODE_ERRORS,
    View,
    decode_json,
    encode_binary,
    view_again,
    view_binary,
    view_of,
)
from models.serving.predictor import InferRequest, InferResponse
from models.serving.reply import Reply
from models.tensor import DTYPES, Array, datatype_of

MAX_HEADS = 256
"""Most heads that are remembered at once, each way; callers and servers that vary them must not grow this without end."""
MAX_HEAD_BYTES = 2048
"""Longest head that is remembered."""
_ALIGNMENT = 8
"""The JSON part is padded with spaces to a multiple of this, so that the first tensor is aligned for every datatype."""
_AS_THEY_ARE = frozenset(DTYPES.values()) - {DTYPES["BYTES"]}
"""Dtypes whose bytes in memory are the wire's, and whose size follows from the shape."""


class _Parameters(msgspec.Struct, frozen=True):
    binary_data_size: int | None = None


class _Output(msgspec.Struct):
    name: str
    datatype: str
    shape: list[int]
    data: msgspec.Raw | msgspec.UnsetType = msgspec.UNSET
    parameters: _Parameters = _Parameters()


class Marks(msgspec.Struct, frozen=True):
    """Where an answer came from and why. None = the server does not say: not every server is ours."""

    tier: str | None = None
    package: str | None = None
    reason: str | None = None
    degraded: bool = False
    confidence: float | None = None


class ResponseHead(msgspec.Struct):
    """What the JSON of an answer says; of one that may come again, also where its tensors lie in a body of `body_bytes`."""

    outputs: list[_Output]
    model_name: str | None = None
    model_version: str | None = None
    id: str | None = None
    parameters: Marks = Marks()


class _Known(msgspec.Struct):
    head: ResponseHead
    body_bytes: int
    views: list[View]


class Heads:
    """Heads that came before, bounded."""

    __slots__ = ("received", "sent")

    def __init__(self) -> None:
        self.sent: dict[Hashable, bytes] = {}
        self.received: dict[bytes, _Known] = {}


_DECODER = msgspec.json.Decoder(ResponseHead)
_ENCODER = msgspec.json.Encoder()


def encode_request(request: InferRequest, heads: Heads | None = None) -> list[bytes]:
    """The body in parts: its JSON first, then one part for each input. Raises InvalidRequest for what cannot be sent."""
    # An id is new in every request, parameters have no hash: such a head does not come again.
    if heads is None or request.id is not None or request.parameters:
        return _encode(request)
    inputs = request.inputs
    key = (
        tuple(request.outputs),
        request.min_confidence,
        request.priority,
        *((name, array.dtype, array.shape) for name, array in inputs.items()),
    )
    head = heads.sent.get(key)
    if head is not None:
        return [head, *(array.tobytes() for array in inputs.values())]
    parts = _encode(request)
    if len(parts[0]) <= MAX_HEAD_BYTES and all(array.dtype in _AS_THEY_ARE for array in inputs.values()):
        _put(heads.sent, key, parts[0])
    return parts


def read_response(
    body: bytes, header_length: int | None, sender: str, heads: Heads | None = None
) -> tuple[Mapping[str, Array], ResponseHead]:
    """The outputs of an answer, and what its JSON says. `sender` is named in errors.

    Output arrays sent as binary data are read-only views of `body`. Raises Unreachable when the bytes are no answer.
    """
    if header_length is None:
        header_length = len(body)
    text = body[:header_length]
    if heads is not None:
        known = heads.received.get(text)
        if known is not None and known.body_bytes == len(body):
            return view_again(body, known.views), known.head
    try:
        head = _DECODER.decode(text)
        outputs = _outputs(head.outputs, body, header_length)
    except (*DECODE_ERRORS, CallerError) as error:
        raise Unreachable(f"{sender} did not answer in the Open Inference Protocol: {error}") from error
    if heads is not None:
        _remember(heads, text, head, len(body))
    return outputs, head


def decode_response(
    body: bytes, header_length: int | None, request: InferRequest, tier: str, heads: Heads | None = None
) -> InferResponse:
    """The answer to `request` as `read_response` reads it. `tier` is what it is marked with when it does not say."""
    outputs, head = read_response(body, header_length, f"the {tier} tier", heads)
    marks = head.parameters
    return InferResponse(
        outputs=outputs,
        model=request.model,
        package=marks.package or request.model,
        version=head.model_version or request.version or "",
        tier=marks.tier or tier,
        confidence=marks.confidence,
        reason=marks.reason or "local",
        degraded=marks.degraded,
        id=request.id,
    )


def header_length_of(reply: Reply, sender: str) -> int | None:
    """Bytes of JSON before the binary data, None = all of the body is JSON. Raises Unreachable for what is no length."""
    value = reply.headers.get(b"inference-header-content-length")
    if value is None:
        return None
    # int() would also take signs, spaces and underscores.
    if not value.isdigit() or not 0 < int(value[:18]) <= len(reply.body):
        raise Unreachable(f"{sender} sent a bad inference-header-content-length")
    return int(value[:18])


def _encode(request: InferRequest) -> list[bytes]:
    parts = [b""]
    inputs = []
    for name, array in request.inputs.items():
        data = encode_binary(array, f"input '{name}'")
        parts.append(data)
        inputs.append(
            {
                "name": name,
                "datatype": datatype_of(array.dtype),
                "shape": array.shape,
                "parameters": {"binary_data_size": len(data)},
            }
        )
    head: dict[str, Any] = {"inputs": inputs, "parameters": _parameters(request)}
    if request.id is not None:
        head["id"] = request.id
    if request.outputs:
        head["outputs"] = [{"name": name} for name in request.outputs]
    try:
        encoded = _ENCODER.encode(head)
    except (TypeError, UnicodeEncodeError, RecursionError) as error:
        raise InvalidRequest(f"the request cannot be sent: {error}") from error
    parts[0] = encoded + b" " * (-len(encoded) % _ALIGNMENT)
    return parts


def _parameters(request: InferRequest) -> dict[str, object]:
    parameters: dict[str, object] = {**request.parameters, "binary_data_output": True}
    if request.min_confidence is not None:
        parameters["min_confidence"] = request.min_confidence
    if request.priority:
        parameters["priority"] = request.priority
    return parameters


def _outputs(tensors: list[_Output], body: bytes, offset: int) -> Mapping[str, Array]:
    outputs: dict[str, Array] = {}
    for tensor in tensors:
        where = f"output '{tensor.name}'"
        size = tensor.parameters.binary_data_size
        if size is not None:
            outputs[tensor.name] = view_binary(body, offset, size, tensor.datatype, tensor.shape, where)
            offset += size
        elif tensor.data is not msgspec.UNSET:
            outputs[tensor.name] = decode_json(tensor.data, tensor.datatype, tensor.shape, where)
        else:
            raise InvalidRequest(f"{where} has no data")
    return outputs


def _remember(heads: Heads, text: bytes, head: ResponseHead, body_bytes: int) -> None:
    # An id or a confidence is another one in the next answer.
    if head.id is not None or head.parameters.confidence is not None or len(text) > MAX_HEAD_BYTES:
        return
    offset = len(text)
    views = []
    for tensor in head.outputs:
        size = tensor.parameters.binary_data_size or 0
        view = view_of(tensor.name, tensor.datatype, tensor.shape, offset, size)
        if view is None:
            return
        views.append(view)
        offset += size
    _put(heads.received, text, _Known(head, body_bytes, views))


def _put(known: dict[Any, Any], key: Hashable, value: object) -> None:
    if len(known) >= MAX_HEADS:
        known.clear()
    known[key] = value
