"""The protocol's routes over HTTP other than inferring: health, metadata, repository, configuration, statistics, logging.

Sources: Open Inference Protocol v2, "HTTP/REST"; Triton's extension documents of the same names.
"""

from __future__ import annotations

from collections.abc import Callable, Coroutine
from functools import lru_cache
from typing import Any
from urllib.parse import unquote_to_bytes

import msgspec

from models.errors import InvalidRequest, NotFound, NotReady
from models.serving.caller import Caller
from models.serving.exchange import JSON, HttpRequest, HttpResponse
from models.serving.plane import EXTENSIONS, DataPlane

MAX_ROUTES = 1024
"""Parsed paths that are remembered; a caller that invents names must not grow this without end."""

Act = Callable[[DataPlane, Caller, HttpRequest, str, "str | None"], Coroutine[Any, Any, HttpResponse]]


class Route(msgspec.Struct, frozen=True):
    """What answers to a path. `open`: without a credential; `model`, `version`: as the path names them."""

    act: Act
    methods: tuple[str, ...] = ("GET", "HEAD")
    open: bool = False
    model: str = ""
    version: str | None = None


async def INFER(*_: object) -> HttpResponse:
    raise AssertionError("inferring is the handler's own")


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


_SERVER_ROUTES: dict[tuple[str, ...], Route] = {
    (): Route(_server_metadata, open=True),
    ("health", "live"): Route(_live, open=True),
    ("health", "ready"): Route(_server_ready, open=True),
}
_MODEL_ROUTES: dict[tuple[str, ...], Route] = {
    (): Route(_model_metadata),
    ("ready",): Route(_model_ready),
    ("infer",): Route(INFER, ("POST",)),
}


@lru_cache(maxsize=MAX_ROUTES)
def find_route(path: str) -> Route:
    """What answers to a path, with the model and the version in it. Raises NotFound, InvalidRequest."""
    parts = tuple(path.removesuffix("/").split("/"))
    if parts[:2] == ("", "v2"):
        route = _SERVER_ROUTES.get(parts[2:])
        if route is not None:
            return route
        if len(parts) > 3 and parts[2] == "models" and parts[3]:
            model, rest = _decoded(parts[3]), parts[4:]
            wanted = None
            if len(rest) > 1 and rest[0] == "versions":
                wanted, rest = _decoded(rest[1]), rest[2:]
            route = _MODEL_ROUTES.get(rest)
            if route is not None:
                return msgspec.structs.replace(route, model=model, version=wanted)
    raise NotFound(f"there is nothing at {path}")


def _decoded(segment: str) -> str:
    try:
        return unquote_to_bytes(segment.encode("latin-1")).decode()
    except UnicodeDecodeError as error:
        raise InvalidRequest("the path is not UTF-8 once its percent-encoding is undone") from error


def _json(value: object) -> HttpResponse:
    return HttpResponse(200, JSON, msgspec.json.encode(value))
