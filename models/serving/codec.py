"""The server's half of Open Inference Protocol v2: request bytes to `InferRequest`, `InferResponse` to response bytes. Pure.

JSON and Triton's binary tensor data extension, each input and output in its own form. In JSON answers NaN and the infinities
become null (JSON has no other word for them); binary answers carry the exact bits.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache
from typing import Any

import msgspec
import numpy as np
import orjson

from models.errors import InvalidRequest, TooLarge
from models.serving.codec_tensor import (
    DECODE_ERRORS,
    View,
    decode_json,
    encode_binary,
    view_again,
    view_binary,
    view_of,
)
from models.serving.parameters import NO_SHARED_MEMORY, binary_output, check_output, min_confidence, priority
from models.serving.predictor import InferRequest, InferResponse
from models.tensor import MAX_BYTES_ELEMENTS, Array, bytes_of, datatype_of

MAX_JSON_BYTES = 4 * 1024 * 1024
"""Most JSON in one request. JSON is decoded in the event loop, where every other caller waits for it."""
MAX_JSON_VALUES = 1 << 19
"""Most values in that JSON, counted by its commas: reading this many takes some 40 ms."""
MAX_JSON_CONTAINERS = 1 << 16
"""Most lists and objects in that JSON, counted by their brackets: reading this many takes some 30 ms."""
MAX_INPUTS = 256
"""Most inputs of one request; no model has nearly as many."""
MAX_HEADS = 256
"""Most request heads that are remembered at once; a caller that varies them must not grow this without end."""
MAX_HEAD_BYTES = 2048
"""Longest request head that is remembered."""

_INSTEAD = "send the tensors as binary data, or fewer at once"


class _InputParameters(msgspec.Struct, frozen=True):
    binary_data_size: int | None = None
    shared_memory_region: str | None = None


class _OutputParameters(msgspec.Struct, frozen=True):
    binary_data: bool | None = None
    classification: int | None = None
    shared_memory_region: str | None = None


class _Input(msgspec.Struct):
    name: str
    datatype: str
    shape: list[int]
    data: msgspec.Raw | msgspec.UnsetType = msgspec.UNSET
    parameters: _InputParameters = _InputParameters()


class _Output(msgspec.Struct):
    name: str
    parameters: _OutputParameters = _OutputParameters()


class _Request(msgspec.Struct):
    inputs: list[_Input]
    id: str | None = None
    outputs: list[_Output] = []
    parameters: dict[str, Any] = {}


class _BinarySize(msgspec.Struct):
    binary_data_size: int


class _Tensor(msgspec.Struct, omit_defaults=True):
    name: str
    datatype: str
    shape: tuple[int, ...]
    parameters: _BinarySize | msgspec.UnsetType = msgspec.UNSET
    data: msgspec.Raw | list[str] | msgspec.UnsetType = msgspec.UNSET


class _Marks(msgspec.Struct):
    """Where the answer came from and why, as the response's `parameters`."""

    tier: str
    package: str
    reason: str
    degraded: bool
    confidence: float | msgspec.UnsetType


class _Response(msgspec.Struct):
    model_name: str
    model_version: str
    id: str | msgspec.UnsetType
    parameters: _Marks
    outputs: list[_Tensor]


class OutputForm(msgspec.Struct, frozen=True):
    """Which outputs the caller wants as binary data: `binary` unless `by_name` says otherwise."""

    binary: bool
    by_name: Mapping[str, bool] = {}


class _Head(msgspec.Struct):
    """What a request's JSON says; of one that may come again, also where its tensors lie in a body of `body_bytes`."""

    tensors: list[_Input]
    id: str | None
    outputs: tuple[str, ...]
    form: OutputForm
    min_confidence: float | None
    priority: int
    parameters: dict[str, Any]
    body_bytes: int = 0
    views: list[View] = []


_Place = tuple[str, np.dtype[Any], tuple[int, ...], int]
"""A tensor that is sent as binary data: its name, dtype and shape, and how many bytes it takes."""

_DECODER = msgspec.json.Decoder(_Request)
_ENCODER = msgspec.json.Encoder()


Heads = dict[bytes, _Head]
"""Heads of binary requests that came before: a program sends the same one again and again, with other numbers after it."""


def decode_request(
    body: bytes,
    header_length: int | None,
    *,
    model: str,
    version: str | None = None,
    deadline: float | None = None,
    trace: str | None = None,
    tenant: str | None = None,
    client: str | None = None,
    heads: Heads | None = None,
) -> tuple[InferRequest, OutputForm]:
    """An infer request. `header_length`: bytes of JSON before the binary data, None = all of the body is JSON.

    `heads`: what earlier calls have remembered, starts empty, bounded; without it nothing is remembered. Input arrays are
    read-only views of `body` where they were sent as binary data. Raises InvalidRequest or TooLarge, naming the tensor or
    field.
    """
    if header_length is None:
        header_length = len(body)
    elif not 0 < header_length <= len(body):
        raise InvalidRequest(f"inference-header-content-length is {header_length}, the body has {len(body)} bytes")
    text = body[:header_length]
    head = None if heads is None or header_length > MAX_HEAD_BYTES else heads.get(text)
    if head is not None and head.body_bytes == len(body):
        inputs = view_again(body, head.views)
    else:
        head = _read_head(text)
        inputs = _inputs(head.tensors, body, header_length)
        if heads is not None:
            _remember(heads, text, head, len(body))
    return InferRequest(
        model=model,
        inputs=inputs,
        version=version,
        outputs=head.outputs,
        deadline=deadline,
        min_confidence=head.min_confidence,
        priority=head.priority,
        tenant=tenant,
        client=client,
        trace=trace,
        id=head.id,
        parameters=head.parameters,
    ), head.form


def encode_response(answer: InferResponse, form: OutputForm, request_id: str | None) -> tuple[list[bytes], int | None]:
    """The body in parts, and the length of its JSON part when binary data follows it (else None).

    Raises InvalidRequest for an output that has no JSON form and was not asked for as binary data.
    """
    tensors: list[_Tensor | _Place] = []
    parts = [b""]
    for name, array in answer.outputs.items():
        if form.by_name.get(name, form.binary):
            data = encode_binary(array, f"output '{name}'")
            parts.append(data)
            tensors.append((name, array.dtype, array.shape, len(data)))
        else:
            tensors.append(_json_tensor(name, array))
    # An id is new in every request, a confidence in every answer.
    comes_again = request_id is None and answer.confidence is None and len(parts) > len(tensors)
    write = _known_head if comes_again else _response_head
    parts[0] = head = write(
        answer.model,
        answer.version,
        request_id,
        answer.tier,
        answer.package,
        answer.reason,
        answer.degraded,
        answer.confidence,
        *tensors,
    )
    return parts, (len(head) if len(parts) > 1 else None)


def _response_head(
    model: str,
    version: str,
    request_id: str | None,
    tier: str,
    package: str,
    reason: str,
    degraded: bool,
    confidence: float | None,
    *tensors: _Tensor | _Place,
) -> bytes:
    """The JSON part of an answer."""
    return _ENCODER.encode(
        _Response(
            model,
            version,
            msgspec.UNSET if request_id is None else request_id,
            _Marks(tier, package, reason, degraded, msgspec.UNSET if confidence is None else confidence),
            [_binary_tensor(*each) if isinstance(each, tuple) else each for each in tensors],
        )
    )


_known_head = lru_cache(maxsize=MAX_HEADS)(_response_head)
"""Of an answer that is all binary: the next one of the same model says the same but for the numbers behind it."""


def _binary_tensor(name: str, dtype: np.dtype[Any], shape: tuple[int, ...], size: int) -> _Tensor:
    return _Tensor(name, datatype_of(dtype), shape, _BinarySize(size))


def _read_head(text: bytes) -> _Head:
    if len(text) > MAX_JSON_CONTAINERS:  # a shorter one is below every limit
        _check_size(text)
    try:
        wire = _DECODER.decode(text)
    except DECODE_ERRORS as error:
        raise InvalidRequest(f"request is not valid: {error}") from error
    if len(wire.inputs) > MAX_INPUTS:
        raise TooLarge(f"the request has {len(wire.inputs)} inputs, at most {MAX_INPUTS} are accepted")
    parameters = wire.parameters
    outputs, form = _wanted(wire.outputs, parameters)
    confidence = min_confidence(parameters) if parameters else None
    urgency = priority(parameters) if parameters else 0
    return _Head(wire.inputs, wire.id, outputs, form, confidence, urgency, parameters)


def _check_size(text: bytes) -> None:
    if len(text) > MAX_JSON_BYTES:
        raise TooLarge(f"{len(text)} bytes of JSON, at most {MAX_JSON_BYTES} are accepted: {_INSTEAD}")
    if text.count(b",") >= MAX_JSON_VALUES:
        raise TooLarge(f"more than {MAX_JSON_VALUES} values in JSON: {_INSTEAD}")
    if text.count(b"[") + text.count(b"{") > MAX_JSON_CONTAINERS:
        raise TooLarge(f"more than {MAX_JSON_CONTAINERS} lists and objects in JSON: {_INSTEAD}")


def _remember(heads: Heads, text: bytes, head: _Head, body_bytes: int) -> None:
    # An id is new in every request: such a head does not come again.
    if head.id is not None or len(text) > MAX_HEAD_BYTES:
        return
    offset = len(text)
    views = []
    for tensor in head.tensors:
        size = tensor.parameters.binary_data_size or 0
        view = view_of(tensor.name, tensor.datatype, tensor.shape, offset, size)
        if view is None:
            return
        views.append(view)
        offset += size
    head.views, head.body_bytes = views, body_bytes
    if len(heads) >= MAX_HEADS:
        heads.clear()
    heads[text] = head


def _inputs(tensors: list[_Input], body: bytes, offset: int) -> dict[str, Array]:
    inputs: dict[str, Array] = {}
    texts = 0
    for tensor in tensors:
        name = tensor.name
        where = f"input '{name}'"
        if name in inputs:
            raise InvalidRequest(f"{where} is given twice")
        parameters = tensor.parameters
        if parameters.shared_memory_region is not None:
            raise InvalidRequest(f"{where}: {NO_SHARED_MEMORY}")
        size = parameters.binary_data_size
        if size is None:
            if tensor.data is msgspec.UNSET:
                raise InvalidRequest(f"{where} has neither data nor the parameter binary_data_size")
            inputs[name] = decode_json(tensor.data, tensor.datatype, tensor.shape, where)
        elif tensor.data is not msgspec.UNSET:
            raise InvalidRequest(f"{where} has both data and the parameter binary_data_size")
        else:
            inputs[name] = view_binary(body, offset, size, tensor.datatype, tensor.shape, where)
            offset += size
        if tensor.datatype == "BYTES":
            texts += inputs[name].size
            if texts > MAX_BYTES_ELEMENTS:
                raise TooLarge(
                    f"{where}: more than {MAX_BYTES_ELEMENTS} BYTES elements are not accepted in one request"
                )
    if offset != len(body):
        raise InvalidRequest(f"{len(body) - offset} bytes of the body belong to no input")
    return inputs


_AS_JSON = OutputForm(False)
_AS_BINARY = OutputForm(True)


def _wanted(outputs: list[_Output], parameters: Mapping[str, Any]) -> tuple[tuple[str, ...], OutputForm]:
    binary = binary_output(parameters) if parameters else False
    form = _AS_BINARY if binary else _AS_JSON
    if not outputs:
        return (), form
    by_name: dict[str, bool] = {}
    for output in outputs:
        shared = output.parameters.shared_memory_region is not None
        check_output(output.name, by_name, shared_memory=shared, classification=output.parameters.classification)
        wanted = output.parameters.binary_data
        by_name[output.name] = binary if wanted is None else wanted
    return tuple(by_name), OutputForm(binary, by_name)


def _json_tensor(name: str, array: Array) -> _Tensor:
    datatype = datatype_of(array.dtype)
    data: msgspec.Raw | list[str]
    if datatype == "BYTES":
        where = f"output '{name}'"
        data = [_text(element, where, index) for index, element in enumerate(array.reshape(-1))]
    elif datatype == "FP16":
        raise InvalidRequest(f"output '{name}' is FP16, which has no JSON form: ask for it with binary_data true")
    else:
        flat = array.reshape(-1)
        # orjson refuses strided views and foreign byte orders.
        if not (flat.flags.c_contiguous and flat.dtype.isnative):
            flat = flat.astype(flat.dtype.newbyteorder("="))
        data = msgspec.Raw(orjson.dumps(flat, option=orjson.OPT_SERIALIZE_NUMPY))
    return _Tensor(name, datatype, array.shape, data=data)


def _text(element: object, where: str, index: int) -> str:
    try:
        return bytes_of(element, where, index).decode()
    except UnicodeDecodeError as error:
        raise InvalidRequest(
            f"{where} is not UTF-8 text, which JSON needs: ask for it with binary_data true"
        ) from error
