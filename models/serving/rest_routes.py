"""The protocol's routes over HTTP other than inferring: health, metadata, repository, configuration, statistics, logging.

Sources: Open Inference Protocol v2, "HTTP/REST"; Triton's extension documents of the same names. Two extensions are answered
with an error that says so: shared memory and trace settings.
"""

from __future__ import annotations

from collections.abc import Callable, Coroutine
from functools import lru_cache
from typing import Any, TypeVar
from urllib.parse import unquote_to_bytes

import msgspec

from models.errors import InvalidRequest, NotFound, NotReady
from models.serving.caller import Caller, require_admin
from models.serving.codec_tensor import DECODE_ERRORS
from models.serving.exchange import JSON, HttpRequest, HttpResponse
from models.serving.plane import EXTENSIONS, DataPlane
from models.serving.rest_body import read_body

T = TypeVar("T")

MAX_ROUTES = 1024
"""Parsed paths that are remembered; a caller that invents names must not grow this without end."""

MAX_SETTINGS_BYTES = 64 * 1024
"""Longest body of a request that is not an inference; what such a body may say fits into a hundred bytes."""

Act = Callable[[DataPlane, Caller, HttpRequest, str, "str | None"], Coroutine[Any, Any, HttpResponse]]


class Route(msgspec.Struct, frozen=True):
    """What answers to a path. `open`: without a credential; `model`, `version`: as the path names them."""

    act: Act
    methods: tuple[str, ...] = ("GET", "HEAD")
    open: bool = False
    model: str = ""
    version: str | None = None


class _IndexBody(msgspec.Struct):
    ready: bool = False


class _ControlBody(msgspec.Struct):
    parameters: dict[str, Any] = {}


async def INFER(*_: object) -> HttpResponse:
    raise AssertionError("inferring is the handler's own")


async def _submit(
    plane: DataPlane, caller: Caller, request: HttpRequest, model: str, wanted: str | None
) -> HttpResponse:
    if plane.submit is None:
        raise NotFound("asynchronous inference is not switched on here")
    return await plane.submit(caller, request, model, wanted)


async def _live(plane: DataPlane, caller: Caller, request: HttpRequest, model: str, wanted: str | None) -> HttpResponse:
    return _json({"live": True})


async def _server_ready(
    plane: DataPlane, caller: Caller, request: HttpRequest, model: str, wanted: str | None
) -> HttpResponse:
    if not plane.is_ready():
        raise NotReady("this server is not ready")
    return _json({"ready": True})


async def _model_ready(
    plane: DataPlane, caller: Caller, request: HttpRequest, model: str, wanted: str | None
) -> HttpResponse:
    if not plane.model_ready(caller, model, wanted):
        raise NotReady(f"model '{model}' is not ready")
    return _json({"name": model, "ready": True})


async def _server_metadata(
    plane: DataPlane, caller: Caller, request: HttpRequest, model: str, wanted: str | None
) -> HttpResponse:
    return _json({"name": plane.name, "version": plane.version, "extensions": EXTENSIONS})


async def _model_metadata(
    plane: DataPlane, caller: Caller, request: HttpRequest, model: str, wanted: str | None
) -> HttpResponse:
    known = plane.describe(caller, model, wanted)
    return _json(
        {
            "name": known.name,
            "versions": known.versions,
            "platform": known.platform,
            "inputs": known.inputs,
            "outputs": known.outputs,
            "parameters": {"package": known.package},
        }
    )


async def _model_config(
    plane: DataPlane, caller: Caller, request: HttpRequest, model: str, wanted: str | None
) -> HttpResponse:
    return _json(plane.config(caller, model, wanted))


async def _statistics(
    plane: DataPlane, caller: Caller, request: HttpRequest, model: str, wanted: str | None
) -> HttpResponse:
    found = plane.statistics(caller, model or None, wanted)
    # Executions by batch size are not counted; perf_analyzer reads the list all the same.
    return _json({"model_stats": [{**msgspec.structs.asdict(each), "batch_stats": []} for each in found]})


async def _repository_index(
    plane: DataPlane, caller: Caller, request: HttpRequest, model: str, wanted: str | None
) -> HttpResponse:
    body = await _body(request, _IndexBody)
    return _json(plane.states(caller, ready_only=body.ready))


async def _load(plane: DataPlane, caller: Caller, request: HttpRequest, model: str, wanted: str | None) -> HttpResponse:
    require_admin(caller)
    body = await _body(request, _ControlBody)
    if body.parameters:
        raise InvalidRequest(
            f"parameters.{min(body.parameters)} is not supported: a model is loaded as the repository holds it"
        )
    await plane.load(caller, model)
    return _json({})


async def _unload(
    plane: DataPlane, caller: Caller, request: HttpRequest, model: str, wanted: str | None
) -> HttpResponse:
    require_admin(caller)
    # No model here depends on another: unload_dependents is as good as done.
    unknown = (await _body(request, _ControlBody)).parameters.keys() - {"unload_dependents"}
    if unknown:
        raise InvalidRequest(f"parameters.{min(unknown)} is not known")
    await plane.unload(caller, model)
    return _json({})


async def _logging(
    plane: DataPlane, caller: Caller, request: HttpRequest, model: str, wanted: str | None
) -> HttpResponse:
    require_admin(caller)
    if request.method == "POST":
        plane.logs.update(await _body(request, dict[str, Any]))
    return _json(plane.logs.values())


async def _no_trace_settings(*_: object) -> HttpResponse:
    raise InvalidRequest(
        "trace settings are not supported here: send a traceparent header, this node decides on sampling"
    )


async def _no_shared_memory(*_: object) -> HttpResponse:
    raise InvalidRequest("shared memory regions are not supported, send the data in the body")


_SERVER_ROUTES: dict[tuple[str, ...], Route] = {
    (): Route(_server_metadata, open=True),
    ("health", "live"): Route(_live, open=True),
    ("health", "ready"): Route(_server_ready, open=True),
    ("models", "stats"): Route(_statistics),
    ("repository", "index"): Route(_repository_index, ("POST",)),
    ("logging",): Route(_logging, ("GET", "HEAD", "POST")),
    ("trace", "setting"): Route(_no_trace_settings, ("GET", "HEAD", "POST")),
}
_MODEL_ROUTES: dict[tuple[str, ...], Route] = {
    (): Route(_model_metadata),
    ("ready",): Route(_model_ready),
    ("infer",): Route(INFER, ("POST",)),
    ("submit",): Route(_submit, ("POST",)),
    ("config",): Route(_model_config),
    ("stats",): Route(_statistics),
    ("trace", "setting"): Route(_no_trace_settings, ("GET", "HEAD", "POST")),
}
_CONTROL_ROUTES: dict[str, Route] = {
    "load": Route(_load, ("POST",)),
    "unload": Route(_unload, ("POST",)),
}
_SHARED_MEMORY = Route(_no_shared_memory, ("GET", "HEAD", "POST"))


@lru_cache(maxsize=MAX_ROUTES)
def find_route(path: str) -> Route:
    """What answers to a path, with the model and the version in it. Raises NotFound, InvalidRequest."""
    parts = tuple(path.removesuffix("/").split("/"))
    route = None
    if parts[:2] == ("", "v2"):
        route = _SERVER_ROUTES.get(parts[2:]) or _below(parts[2:])
    if route is None:
        raise NotFound(f"there is nothing at {path}")
    return route


def _below(parts: tuple[str, ...]) -> Route | None:
    """A route with a name in its path."""
    match parts:
        case ("models", name, *rest) if name:
            model, wanted = _decoded(name), None
            if len(rest) > 1 and rest[0] == "versions":
                wanted, rest = _decoded(rest[1]), rest[2:]
            route = _MODEL_ROUTES.get(tuple(rest))
            return route and msgspec.structs.replace(route, model=model, version=wanted)
        case ("repository", "models", name, act) if name and act in _CONTROL_ROUTES:
            return msgspec.structs.replace(_CONTROL_ROUTES[act], model=_decoded(name))
        case ("systemsharedmemory" | "cudasharedmemory", *_):
            return _SHARED_MEMORY
    return None


def _decoded(segment: str) -> str:
    try:
        return unquote_to_bytes(segment.encode("latin-1")).decode()
    except UnicodeDecodeError as error:
        raise InvalidRequest("the path is not UTF-8 once its percent-encoding is undone") from error


async def _body(request: HttpRequest, kind: type[T]) -> T:
    """The body as JSON; an empty one says nothing. Raises InvalidRequest, naming the field, TooLarge, UnsupportedEncoding."""
    body = await read_body(request, MAX_SETTINGS_BYTES)
    try:
        return msgspec.json.decode(body or b"{}", type=kind)
    except DECODE_ERRORS as error:
        raise InvalidRequest(f"the body is not valid: {error}") from error


def _json(value: object) -> HttpResponse:
    return HttpResponse(200, JSON, msgspec.json.encode(value))
