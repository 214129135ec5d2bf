"""The protocol over gRPC: what is sent and how answers are read. Pure; shared by the blocking and the asynchronous client.

Messages are those of `models.serving.grpc`, wire-compatible with every server that speaks `inference.GRPCInferenceService`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

import msgspec
import numpy as np

from models.client.answer import Answer, Metadata, ModelState, ModelStatistics
from models.client.calls import Call
from models.errors import CallerError, InvalidRequest, Unreachable
from models.serving.codec_client import Marks
from models.serving.codec_tensor import encode_binary, view_binary
from models.serving.endpoint import HEADER_VALUE
from models.serving.predictor import InferRequest
from models.tensor import DTYPES, Array, TensorSpec, datatype_of, element_count

try:
    from google.protobuf.json_format import MessageToDict  # type: ignore[import-untyped]

    from models.serving.grpc import inference_pb2 as pb
except ModuleNotFoundError as error:
    raise ImportError(f"grpc:// needs '{error.name}': pip install 'tierline[grpc]'") from error

T = TypeVar("T")

SERVICE = "/inference.GRPCInferenceService/"
_TYPED = {
    "BOOL": "bool_contents",
    "INT8": "int_contents",
    "INT16": "int_contents",
    "INT32": "int_contents",
    "INT64": "int64_contents",
    "UINT8": "uint_contents",
    "UINT16": "uint_contents",
    "UINT32": "uint_contents",
    "UINT64": "uint64_contents",
    "FP32": "fp32_contents",
    "FP64": "fp64_contents",
    "BYTES": "bytes_contents",
}
"""Where an answer that holds no raw bytes has a datatype's elements."""


class GrpcCall(Call[T]):
    """`method`: its full name. `kind`: the class of the answer. `metadata`: sent beside the message."""

    __slots__ = ("kind", "message", "metadata", "method", "read", "repeatable")

    def __init__(
        self,
        method: str,
        message: Any,
        kind: Any,
        read: Callable[[Any], T],
        metadata: tuple[tuple[str, str], ...],
        repeatable: bool,
    ) -> None:
        self.method = SERVICE + method
        self.message = message
        self.kind = kind
        self.read = read
        self.metadata = metadata
        self.repeatable = repeatable


class GrpcCalls:
    """`peer`: the server's name in errors. `token`: sent as a bearer token."""

    def __init__(self, peer: str, token: str | None) -> None:
        if token is not None and not HEADER_VALUE.fullmatch(token):
            raise ValueError("the token holds characters that a header cannot carry")
        self._peer = peer
        self._metadata = () if token is None else (("authorization", f"Bearer {token}"),)

    def infer(self, request: InferRequest) -> GrpcCall[Answer]:
        metadata = self._metadata
        if request.trace is not None:
            if not HEADER_VALUE.fullmatch(request.trace):
                raise InvalidRequest("trace holds characters that a header cannot carry")
            metadata = (*metadata, ("traceparent", request.trace))
        message = _encode(request)
        return GrpcCall("ModelInfer", message, pb.ModelInferResponse, self._reader(request), metadata, repeatable=True)

    def live(self) -> GrpcCall[bool]:
        return self._call("ServerLive", pb.ServerLiveRequest(), pb.ServerLiveResponse, lambda got: bool(got.live))

    def ready(self, model: str | None, version: str | None) -> GrpcCall[bool]:
        if model is None:
            return self._call("ServerReady", pb.ServerReadyRequest(), pb.ServerReadyResponse, _is_ready)
        message = pb.ModelReadyRequest(name=model, version=version or "")
        return self._call("ModelReady", message, pb.ModelReadyResponse, _is_ready)

    def metadata(self, model: str, version: str | None) -> GrpcCall[Metadata]:
        message = pb.ModelMetadataRequest(name=model, version=version or "")
        return self._call("ModelMetadata", message, pb.ModelMetadataResponse, _metadata)

    def index(self, ready_only: bool) -> GrpcCall[list[ModelState]]:
        message = pb.RepositoryIndexRequest(ready=ready_only)
        return self._call("RepositoryIndex", message, pb.RepositoryIndexResponse, _states)

    def load(self, model: str) -> GrpcCall[None]:
        message = pb.RepositoryModelLoadRequest(model_name=model)
        return self._call("RepositoryModelLoad", message, pb.RepositoryModelLoadResponse, _nothing, repeatable=False)

    def unload(self, model: str) -> GrpcCall[None]:
        message = pb.RepositoryModelUnloadRequest(model_name=model)
        return self._call(
            "RepositoryModelUnload", message, pb.RepositoryModelUnloadResponse, _nothing, repeatable=False
        )

    def config(self, model: str, version: str | None) -> GrpcCall[Mapping[str, Any]]:
        message = pb.ModelConfigRequest(name=model, version=version or "")
        return self._call("ModelConfig", message, pb.ModelConfigResponse, _config)

    def statistics(self, model: str | None, version: str | None) -> GrpcCall[Sequence[ModelStatistics]]:
        message = pb.ModelStatisticsRequest(name=model or "", version=version or "")
        return self._call("ModelStatistics", message, pb.ModelStatisticsResponse, _statistics)

    def _call(
        self,
        method: str,
        message: Any,
        kind: Any,
        read: Callable[[Any], T],
        *,
        repeatable: bool = True,
    ) -> GrpcCall[T]:
        return GrpcCall(method, message, kind, read, self._metadata, repeatable)

    def _reader(self, request: InferRequest) -> Callable[[Any], Answer]:
        def read(got: Any) -> Answer:
            try:
                outputs = _outputs(got)
                said = {name: _value(parameter) for name, parameter in got.parameters.items()}
                marks = msgspec.convert(said, Marks)
            except (CallerError, msgspec.ValidationError, ValueError, OverflowError) as error:
                raise Unreachable(f"{self._peer} did not answer in the Open Inference Protocol: {error}") from error
            return Answer(
                outputs=outputs,
                model=request.model,
                version=got.model_version or request.version,
                package=marks.package,
                tier=marks.tier,
                confidence=marks.confidence,
                reason=marks.reason,
                degraded=marks.degraded,
                id=got.id or None,
            )

        return read


def _encode(request: InferRequest) -> Any:
    tensors, raw = [], []
    for name, array in request.inputs.items():
        raw.append(encode_binary(array, f"input '{name}'"))
        tensors.append(
            pb.ModelInferRequest.InferInputTensor(name=name, datatype=datatype_of(array.dtype), shape=array.shape)
        )
    parameters = dict(request.parameters)
    if request.min_confidence is not None:
        parameters["min_confidence"] = request.min_confidence
    if request.priority:
        parameters["priority"] = request.priority
    try:
        return pb.ModelInferRequest(
            model_name=request.model,
            model_version=request.version or "",
            id=request.id or "",
            parameters={name: _parameter(name, value) for name, value in parameters.items()},
            inputs=tensors,
            outputs=[pb.ModelInferRequest.InferRequestedOutputTensor(name=name) for name in request.outputs],
            raw_input_contents=raw,
        )
    except (TypeError, ValueError) as error:
        raise InvalidRequest(f"the request cannot be sent: {error}") from error


def _parameter(name: str, value: object) -> Any:
    match value:
        case bool():
            return pb.InferParameter(bool_param=value)
        case int() if value < 1 << 63:
            return pb.InferParameter(int64_param=value)
        case int():
            return pb.InferParameter(uint64_param=value)
        case float():
            return pb.InferParameter(double_param=value)
        case str():
            return pb.InferParameter(string_param=value)
    raise InvalidRequest(f"parameters.{name} is of type {type(value).__name__}, gRPC carries bool, int, float and str")


def _value(parameter: Any) -> object:
    chosen = parameter.WhichOneof("parameter_choice")
    return None if chosen is None else getattr(parameter, chosen)


def _outputs(got: Any) -> dict[str, Array]:
    raw = got.raw_output_contents
    if raw and len(raw) != len(got.outputs):
        raise InvalidRequest(f"{len(got.outputs)} outputs have {len(raw)} raw contents")
    outputs = {}
    for index, tensor in enumerate(got.outputs):
        where = f"output '{tensor.name}'"
        if raw:
            data = raw[index]
            outputs[tensor.name] = view_binary(data, 0, len(data), tensor.datatype, tuple(tensor.shape), where)
        else:
            outputs[tensor.name] = _typed(tensor, where)
    return outputs


def _typed(tensor: Any, where: str) -> Array:
    field = _TYPED.get(tensor.datatype)
    if field is None:
        raise InvalidRequest(f"{where}: {tensor.datatype!r} has no typed contents")
    values = getattr(tensor.contents, field)
    if len(values) != element_count(tensor.shape, where):
        raise InvalidRequest(f"{where}: shape {list(tensor.shape)} does not have {len(values)} elements")
    return np.array(list(values), DTYPES[tensor.datatype]).reshape(tuple(tensor.shape))


def _is_ready(got: Any) -> bool:
    return bool(got.ready)


def _nothing(got: Any) -> None:
    return None


def _metadata(got: Any) -> Metadata:
    return Metadata(got.name, tuple(got.versions), got.platform, _specs(got.inputs), _specs(got.outputs))


def _specs(tensors: Any) -> tuple[TensorSpec, ...]:
    return tuple(TensorSpec(tensor.name, tensor.datatype, tuple(tensor.shape)) for tensor in tensors)


def _states(got: Any) -> list[ModelState]:
    return [ModelState(each.name, each.version, each.state, each.reason) for each in got.models]


def _config(got: Any) -> Mapping[str, Any]:
    config: dict[str, Any] = MessageToDict(got.config, preserving_proto_field_name=True)
    return config


def _statistics(got: Any) -> Sequence[ModelStatistics]:
    found = MessageToDict(got, preserving_proto_field_name=True).get("model_stats", [])
    # Its 64-bit integers are JSON strings.
    return msgspec.convert(found, list[ModelStatistics], strict=False)
