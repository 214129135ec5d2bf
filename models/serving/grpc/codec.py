"""ModelInferRequest bytes to what is asked, `InferResponse` to ModelInferResponse bytes. Pure.

Means the same as `models.serving.codec` does over HTTP: same checks, same words. Outputs are always raw.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import msgspec
from google.protobuf.message import DecodeError  # type: ignore[import-untyped]

from models.errors import InvalidRequest, TooLarge
from models.serving import parameters as said
from models.serving.caller import Caller
from models.serving.codec import MAX_HEAD_BYTES as MAX_KNOWN_BYTES
from models.serving.codec import MAX_HEADS, MAX_INPUTS
from models.serving.codec_tensor import View, encode_binary, view_again, view_of
from models.serving.grpc import inference_pb2 as pb
from models.serving.grpc.contents import MAX_TYPED_VALUES, raw_tensor, typed_tensor
from models.serving.grpc.split import Place, bytes_prefix, split_request
from models.serving.predictor import InferRequest, InferResponse
from models.tensor import DTYPES, MAX_BYTES_ELEMENTS, Array, datatype_of

_RAW_OUTPUTS = 6
"""Field number of `raw_output_contents`."""
FINAL = "triton_enable_empty_final_response"
"""Set by streaming clients that wait for an answer marked as the last one; every answer here is."""


class Head(msgspec.Struct):
    """What a message says beside its id and its numbers; of one that may come again, also how its tensors lie."""

    model: str
    version: str | None
    tensors: Any
    outputs: tuple[str, ...]
    min_confidence: float | None
    priority: int
    parameters: dict[str, Any]
    raws: list[Place] = []
    views: list[View] = []


Heads = dict[bytes, Head]
"""Heads of raw requests that came before: a program sends the same one again and again, with other numbers."""


class Asked(msgspec.Struct):
    """One inference as its caller put it. `id`: None = none was given."""

    head: Head
    inputs: dict[str, Array]
    id: str | None

    def request(self, caller: Caller, deadline: float | None, trace: str | None) -> InferRequest:
        """`deadline`: monotonic seconds."""
        head = self.head
        return InferRequest(
            model=head.model,
            inputs=self.inputs,
            version=head.version,
            outputs=head.outputs,
            deadline=deadline,
            min_confidence=head.min_confidence,
            priority=head.priority,
            tenant=caller.tenant,
            client=caller.client,
            trace=trace,
            id=self.id,
            parameters=head.parameters,
        )


def decode_request(data: bytes, heads: Heads) -> Asked:
    """`heads`: what earlier calls have remembered, starts empty, bounded. Input arrays are read-only views of `data`.

    Raises InvalidRequest or TooLarge, naming the tensor or field.
    """
    text, request_id, raws = split_request(data)
    head = heads.get(text)
    if head is not None and head.raws == raws:
        return Asked(head, view_again(data, head.views), request_id)
    head = _read_head(text)
    inputs = _inputs(head.tensors, data, raws)
    _remember(heads, text, head, raws)
    return Asked(head, inputs, request_id)


def encode_response(answer: InferResponse, request_id: str | None, *, final: bool = False) -> bytes:
    """`final`: mark the answer as its request's last. Raises InvalidRequest for an output the protocol cannot express."""
    message = pb.ModelInferResponse(model_name=answer.model, model_version=answer.version, id=request_id)
    parameters = message.parameters
    parameters["tier"].string_param = answer.tier
    parameters["package"].string_param = answer.package
    parameters["reason"].string_param = answer.reason
    parameters["degraded"].bool_param = answer.degraded
    if answer.confidence is not None:
        parameters["confidence"].double_param = answer.confidence
    if final:
        parameters["triton_final_response"].bool_param = True
    raws: list[bytes] = []
    for name, array in answer.outputs.items():
        message.outputs.add(name=name, datatype=datatype_of(array.dtype), shape=array.shape)
        data = encode_binary(array, f"output '{name}'")
        raws += (bytes_prefix(_RAW_OUTPUTS, len(data)), data)
    # The message's last field: written behind it, the numbers need not pass through protobuf.
    return b"".join((message.SerializeToString(), *raws))


def _read_head(text: bytes) -> Head:
    try:
        message = pb.ModelInferRequest.FromString(text)
    except DecodeError as error:
        raise InvalidRequest("the message is not a ModelInferRequest") from error
    if len(message.inputs) > MAX_INPUTS:
        raise TooLarge(f"the request has {len(message.inputs)} inputs, at most {MAX_INPUTS} are accepted")
    parameters = {name: value_of(value) for name, value in message.parameters.items()}
    said.binary_output(parameters)
    return Head(
        message.model_name,
        message.model_version or None,
        message.inputs,
        _outputs(message.outputs),
        said.min_confidence(parameters),
        said.priority(parameters),
        parameters,
    )


def value_of(parameter: Any) -> Any:
    """What a parameter holds, None = nothing."""
    kind = parameter.WhichOneof("parameter_choice")
    return None if kind is None else getattr(parameter, kind)


def _outputs(tensors: Any) -> tuple[str, ...]:
    names: dict[str, None] = {}
    for tensor in tensors:
        given: Mapping[str, Any] = tensor.parameters
        said.check_output(
            tensor.name,
            names,
            shared_memory="shared_memory_region" in given,
            classification="classification" in given and value_of(given["classification"]),
        )
        names[tensor.name] = None
    return tuple(names)


def _inputs(tensors: Any, data: bytes, raws: list[Place]) -> dict[str, Array]:
    inputs: dict[str, Array] = {}
    texts, room = 0, MAX_TYPED_VALUES
    for index, tensor in enumerate(tensors):
        name = tensor.name
        where = f"input '{name}'"
        if name in inputs:
            raise InvalidRequest(f"{where} is given twice")
        if "shared_memory_region" in tensor.parameters:
            raise InvalidRequest(f"{where}: {said.NO_SHARED_MEMORY}")
        datatype = tensor.datatype
        if datatype not in DTYPES:
            raise InvalidRequest(f"{where}: datatype {datatype!r} is none of {', '.join(DTYPES)}")
        if not raws:
            inputs[name] = typed_tensor(tensor.contents, datatype, tensor.shape, where, room)
            room -= inputs[name].size
        elif tensor.HasField("contents") and tensor.contents.ByteSize():
            raise InvalidRequest(f"{where} has contents, and the request has raw_input_contents: send one of them")
        elif index < len(raws):
            inputs[name] = raw_tensor(data, index, raws[index], datatype, tensor.shape, where)
        else:
            raise InvalidRequest(f"{where} has no raw_input_contents: there are {len(raws)} for {len(tensors)} inputs")
        if datatype == "BYTES":
            texts += inputs[name].size
            if texts > MAX_BYTES_ELEMENTS:
                raise TooLarge(
                    f"{where}: more than {MAX_BYTES_ELEMENTS} BYTES elements are not accepted in one request"
                )
    if len(raws) > len(tensors):
        raise InvalidRequest(f"{len(raws)} raw_input_contents for {len(tensors)} inputs")
    return inputs


def _remember(heads: Heads, text: bytes, head: Head, raws: list[Place]) -> None:
    if not raws or len(text) > MAX_KNOWN_BYTES:
        return
    views = []
    for tensor, (offset, size) in zip(head.tensors, raws, strict=True):
        view = view_of(tensor.name, tensor.datatype, tensor.shape, offset, size)
        if view is None:
            return
        views.append(view)
    head.tensors, head.views, head.raws = (), views, raws
    if len(heads) >= MAX_HEADS:
        heads.clear()
    heads[text] = head
