"""The client's half of Open Inference Protocol v2: `InferRequest` to request bytes, response bytes to `InferResponse`. Pure.

Tensors travel as binary data in both directions; answers in JSON are read as well.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import msgspec

from models.errors import CallerError, InvalidRequest, Unreachable
from models.serving.codec_tensor import DECODE_ERRORS, decode_json, encode_binary, view_binary
from models.serving.predictor import InferRequest, InferResponse
from models.tensor import Array, datatype_of

_ALIGNMENT = 8
"""The JSON part is padded with spaces to a multiple of this, so that the first tensor is aligned for every datatype."""


class _Parameters(msgspec.Struct, frozen=True):
    binary_data_size: int | None = None


class _Output(msgspec.Struct):
    name: str
    datatype: str
    shape: list[int]
    data: msgspec.Raw | msgspec.UnsetType = msgspec.UNSET
    parameters: _Parameters = _Parameters()


class _Marks(msgspec.Struct, frozen=True):
    tier: str | None = None
    package: str | None = None
    reason: str | None = None
    degraded: bool = False
    confidence: float | None = None


class _Response(msgspec.Struct):
    outputs: list[_Output]
    model_name: str = ""
    model_version: str | None = None
    id: str | None = None
    parameters: _Marks = _Marks()


_DECODER = msgspec.json.Decoder(_Response)
_ENCODER = msgspec.json.Encoder()


def encode_request(request: InferRequest) -> list[bytes]:
    """The body in parts: its JSON first, then one part for each input. Raises InvalidRequest for what cannot be sent."""
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


def decode_response(body: bytes, header_length: int | None, request: InferRequest, tier: str) -> InferResponse:
    """The answer to `request`. `tier` is what the answer is marked with when it does not say.

    Output arrays sent as binary data are read-only views of `body`. Raises Unreachable when the bytes are no answer.
    """
    if header_length is None:
        header_length = len(body)
    try:
        wire = _DECODER.decode(body[:header_length])
        outputs = _outputs(wire.outputs, body, header_length)
    except (*DECODE_ERRORS, CallerError) as error:
        raise Unreachable(f"the {tier} tier did not answer in the Open Inference Protocol: {error}") from error
    marks = wire.parameters
    return InferResponse(
        outputs=outputs,
        model=request.model,
        package=marks.package or request.model,
        version=wire.model_version or request.version or "",
        tier=marks.tier or tier,
        confidence=marks.confidence,
        reason=marks.reason or "local",
        degraded=marks.degraded,
        id=request.id,
    )


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
