"""Every call of the protocol but inferring: message in, data plane asked, message out.

The same words and rights as the routes of `models.serving.rest_routes`.
"""

from __future__ import annotations

from collections.abc import Callable, Coroutine, Mapping
from typing import Any

import msgspec
from google.protobuf import json_format  # type: ignore[import-untyped]

from models.errors import InvalidRequest, MethodNotAllowed, NotFound
from models.serving.caller import Caller, require_admin
from models.serving.grpc import inference_pb2 as pb
from models.serving.grpc.codec import value_of
from models.serving.index import ModelStatistics
from models.serving.parameters import NO_SHARED_MEMORY
from models.serving.plane import EXTENSIONS, DataPlane

Act = Callable[[DataPlane, Caller, Any], Coroutine[Any, Any, Any]]


class Method(msgspec.Struct, frozen=True):
    """How a call is answered. `message`: class of its request. `open`: without a credential."""

    act: Act
    message: Any
    open: bool = False


async def _server_live(plane: DataPlane, caller: Caller, asked: Any) -> Any:
    return pb.ServerLiveResponse(live=True)


async def _server_ready(plane: DataPlane, caller: Caller, asked: Any) -> Any:
    return pb.ServerReadyResponse(ready=plane.is_ready())


async def _server_metadata(plane: DataPlane, caller: Caller, asked: Any) -> Any:
    return pb.ServerMetadataResponse(name=plane.name, version=plane.version, extensions=EXTENSIONS)


async def _model_ready(plane: DataPlane, caller: Caller, asked: Any) -> Any:
    try:
        ready = plane.model_ready(caller, asked.name, asked.version or None)
    except NotFound:
        # As Triton answers: clients ask this to find out whether a model is there, and an error would end them.
        ready = False
    return pb.ModelReadyResponse(ready=ready)


async def _model_metadata(plane: DataPlane, caller: Caller, asked: Any) -> Any:
    known = plane.describe(caller, asked.name, asked.version or None)
    answer = pb.ModelMetadataResponse(name=known.name, versions=known.versions, platform=known.platform)
    for specs, listed in ((known.inputs, answer.inputs), (known.outputs, answer.outputs)):
        for spec in specs:
            listed.add(name=spec.name, datatype=spec.datatype, shape=spec.shape)
    return answer


async def _model_config(plane: DataPlane, caller: Caller, asked: Any) -> Any:
    config = plane.config(caller, asked.name, asked.version or None)
    answer = pb.ModelConfigResponse()
    # What has no field in the message is left out.
    json_format.Parse(msgspec.json.encode(config), answer.config, ignore_unknown_fields=True)
    return answer


async def _model_statistics(plane: DataPlane, caller: Caller, asked: Any) -> Any:
    answer = pb.ModelStatisticsResponse()
    for each in plane.statistics(caller, asked.name or None, asked.version or None):
        _add_statistics(answer.model_stats.add(), each)
    return answer


def _add_statistics(message: Any, counted: ModelStatistics) -> None:
    message.name, message.version = counted.name, counted.version
    message.last_inference = counted.last_inference
    message.inference_count = counted.inference_count
    message.execution_count = counted.execution_count
    for phase, duration in counted.inference_stats.items():
        into = getattr(message.inference_stats, phase)
        into.count, into.ns = duration.count, duration.ns


async def _repository_index(plane: DataPlane, caller: Caller, asked: Any) -> Any:
    _check_repository(asked)
    answer = pb.RepositoryIndexResponse()
    for state in plane.states(caller, ready_only=asked.ready):
        answer.models.add(name=state.name, version=state.version, state=state.state, reason=state.reason)
    return answer


async def _load(plane: DataPlane, caller: Caller, asked: Any) -> Any:
    require_admin(caller)
    _check_repository(asked)
    if asked.parameters:
        raise InvalidRequest(
            f"parameters.{min(asked.parameters)} is not supported: a model is loaded as the repository holds it"
        )
    await plane.load(caller, asked.model_name)
    return pb.RepositoryModelLoadResponse()


async def _unload(plane: DataPlane, caller: Caller, asked: Any) -> Any:
    require_admin(caller)
    _check_repository(asked)
    # No model here depends on another: unload_dependents is as good as done.
    unknown = set(asked.parameters) - {"unload_dependents"}
    if unknown:
        raise InvalidRequest(f"parameters.{min(unknown)} is not known")
    await plane.unload(caller, asked.model_name)
    return pb.RepositoryModelUnloadResponse()


def _check_repository(asked: Any) -> None:
    if asked.repository_name:
        raise InvalidRequest("repository_name is not supported: this server has one repository, say nothing")


async def _log_settings(plane: DataPlane, caller: Caller, asked: Any) -> Any:
    require_admin(caller)
    if asked.settings:
        plane.logs.update({name: value_of(value) for name, value in asked.settings.items()})
    answer = pb.LogSettingsResponse()
    _fill_settings(answer.settings, plane.logs.values())
    return answer


def _fill_settings(settings: Any, values: Mapping[str, object]) -> None:
    for name, value in values.items():
        kind = {bool: "bool_param", int: "uint32_param"}.get(type(value), "string_param")
        setattr(settings[name], kind, value)


def _refusing(reason: str) -> Act:
    async def refuse(plane: DataPlane, caller: Caller, asked: Any) -> Any:
        raise MethodNotAllowed(reason)

    return refuse


_no_shared_memory = _refusing(NO_SHARED_MEMORY)
_no_trace_settings = _refusing(
    "trace settings are not supported here: send a traceparent header, this node decides on sampling"
)

METHODS: dict[str, Method] = {
    "ServerLive": Method(_server_live, pb.ServerLiveRequest, open=True),
    "ServerReady": Method(_server_ready, pb.ServerReadyRequest, open=True),
    "ServerMetadata": Method(_server_metadata, pb.ServerMetadataRequest, open=True),
    "ModelReady": Method(_model_ready, pb.ModelReadyRequest),
    "ModelMetadata": Method(_model_metadata, pb.ModelMetadataRequest),
    "ModelConfig": Method(_model_config, pb.ModelConfigRequest),
    "ModelStatistics": Method(_model_statistics, pb.ModelStatisticsRequest),
    "RepositoryIndex": Method(_repository_index, pb.RepositoryIndexRequest),
    "RepositoryModelLoad": Method(_load, pb.RepositoryModelLoadRequest),
    "RepositoryModelUnload": Method(_unload, pb.RepositoryModelUnloadRequest),
    "LogSettings": Method(_log_settings, pb.LogSettingsRequest),
    "TraceSetting": Method(_no_trace_settings, pb.TraceSettingRequest),
    "SystemSharedMemoryStatus": Method(_no_shared_memory, pb.SystemSharedMemoryStatusRequest),
    "SystemSharedMemoryRegister": Method(_no_shared_memory, pb.SystemSharedMemoryRegisterRequest),
    "SystemSharedMemoryUnregister": Method(_no_shared_memory, pb.SystemSharedMemoryUnregisterRequest),
    "CudaSharedMemoryStatus": Method(_no_shared_memory, pb.CudaSharedMemoryStatusRequest),
    "CudaSharedMemoryRegister": Method(_no_shared_memory, pb.CudaSharedMemoryRegisterRequest),
    "CudaSharedMemoryUnregister": Method(_no_shared_memory, pb.CudaSharedMemoryUnregisterRequest),
}
"""Name of the call -> how it is answered."""
