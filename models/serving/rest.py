"""Open Inference Protocol v2 over HTTP as a pure handler: decodes, asks the predictor, encodes. No sockets here.

Every error leaves as `{"error": "<text>"}` with the status of its class in `models.errors`. What nobody expected is logged
with its trace and leaves as 500 `{"error": "internal error"}`: internals are never shown.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Coroutine, Mapping
from importlib.metadata import PackageNotFoundError, version
from math import isfinite
from typing import Any
from urllib.parse import unquote_to_bytes

import msgspec

from models.errors import (
    InvalidRequest,
    MethodNotAllowed,
    NotFound,
    NotReady,
    TierlineError,
    TryAgain,
    UnsupportedEncoding,
)
from models.serving.codec import Heads, decode_request, encode_response
from models.serving.exchange import JSON, OCTETS, Handler, HttpRequest, HttpResponse, error_body, error_response
from models.serving.index import ModelIndex
from models.serving.predictor import Predictor

log = logging.getLogger("tierline.rest")

EXTENSIONS = ("binary_tensor_data",)
"""Protocol extensions that this server has."""
MAX_ROUTES = 1024
"""Parsed infer paths that are remembered; a caller that invents names must not grow this without end."""
BINARY_HEADER = b"inference-header-content-length"
DEADLINE_HEADER = b"tierline-deadline-ms"

# What curl sends unasked stands beside JSON: the body is decoded as JSON whatever the header says.
_BODY_TYPES = frozenset((b"application/json", b"application/octet-stream", b"application/x-www-form-urlencoded", b""))

_Act = Callable[["RestHandler", HttpRequest, str, str | None], Coroutine[Any, Any, HttpResponse]]


class RestHandler:
    """Answers the protocol's routes, and hands paths below a prefix of `extra` to another handler.

    `ready` says whether the server as a whole may get traffic. A prefix starts with '/' and matches itself and what is
    below it: "/blobs" takes /blobs and /blobs/x.
    """

    def __init__(
        self,
        predictor: Predictor,
        index: ModelIndex,
        *,
        ready: Callable[[], bool],
        name: str = "tierline",
        extra: Mapping[str, Handler] | None = None,
    ) -> None:
        self._predictor = predictor
        self._index = index
        self._ready = ready
        self._name = name
        self._extra = dict(extra or {})
        self._infer_routes: dict[str, tuple[str, str | None]] = {}
        self._heads: Heads = {}

    async def __call__(self, request: HttpRequest) -> HttpResponse:
        try:
            if request.method == "POST":
                route = self._infer_routes.get(request.path)
                if route is not None:
                    return await self._infer(request, *route)
            return await self._other(request)
        except TierlineError as error:
            if error.http >= 500 and not isinstance(error, TryAgain):
                log.exception("%s failed", request.path)
            return error_response(error)
        except Exception:
            log.exception("%s failed unexpectedly", request.path)
            return HttpResponse(500, JSON, error_body("internal error"))

    async def _other(self, request: HttpRequest) -> HttpResponse:
        prefix = "/" + request.path[1:].partition("/")[0]
        extra = self._extra.get(prefix)
        if extra is not None:
            return await extra(request)
        act, model, wanted = _route(request.path)
        allowed = _METHODS.get(act, ("GET", "HEAD"))
        if request.method not in allowed:
            raise MethodNotAllowed(f"{request.path} takes {' or '.join(allowed)}, not {request.method}")
        if act is RestHandler._infer:
            if len(self._infer_routes) >= MAX_ROUTES:
                self._infer_routes.clear()
            self._infer_routes[request.path] = (model, wanted)
        return await act(self, request, model, wanted)

    async def _infer(self, request: HttpRequest, model: str, wanted: str | None) -> HttpResponse:
        headers = request.headers
        _check_encoding(headers)
        length = headers.get(BINARY_HEADER)
        deadline = headers.get(DEADLINE_HEADER)
        trace = headers.get(b"traceparent")
        inference, form = decode_request(
            request.body,
            None if length is None else _header_length(length),
            model=model,
            version=wanted,
            deadline=None if deadline is None else _deadline(deadline),
            trace=None if trace is None else trace.decode("latin-1"),
            heads=self._heads,
        )
        answer = await self._predictor.infer(inference)
        body, header_length = encode_response(answer, form, inference.id)
        if header_length is None:
            return HttpResponse(200, JSON, body)
        return HttpResponse(200, b"%binference-header-content-length: %d\r\n" % (OCTETS, header_length), body)

    async def _live(self, request: HttpRequest, model: str, wanted: str | None) -> HttpResponse:
        return _json({"live": True})

    async def _server_ready(self, request: HttpRequest, model: str, wanted: str | None) -> HttpResponse:
        if not self._ready():
            raise NotReady("this server is not ready")
        return _json({"ready": True})

    async def _model_ready(self, request: HttpRequest, model: str, wanted: str | None) -> HttpResponse:
        if not self._index.is_ready(model, wanted):
            raise NotReady(f"model '{model}' is not ready")
        return _json({"name": model, "ready": True})

    async def _server_metadata(self, request: HttpRequest, model: str, wanted: str | None) -> HttpResponse:
        return _json({"name": self._name, "version": _version(), "extensions": EXTENSIONS})

    async def _model_metadata(self, request: HttpRequest, model: str, wanted: str | None) -> HttpResponse:
        known = self._index.describe(model, wanted)
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


_METHODS: dict[_Act, tuple[str, ...]] = {RestHandler._infer: ("POST",)}
_SERVER_ROUTES: dict[tuple[str, ...], _Act] = {
    (): RestHandler._server_metadata,
    ("health", "live"): RestHandler._live,
    ("health", "ready"): RestHandler._server_ready,
}
_MODEL_ROUTES: dict[tuple[str, ...], _Act] = {
    (): RestHandler._model_metadata,
    ("ready",): RestHandler._model_ready,
    ("infer",): RestHandler._infer,
}


def _route(path: str) -> tuple[_Act, str, str | None]:
    """What answers to a path, with the model and the version in it. Raises NotFound."""
    parts = tuple(path.removesuffix("/").split("/"))
    if parts[:2] == ("", "v2"):
        act = _SERVER_ROUTES.get(parts[2:])
        if act is not None:
            return act, "", None
        if len(parts) > 3 and parts[2] == "models" and parts[3]:
            model, rest = _decoded(parts[3]), parts[4:]
            wanted = None
            if len(rest) > 1 and rest[0] == "versions":
                wanted, rest = _decoded(rest[1]), rest[2:]
            act = _MODEL_ROUTES.get(rest)
            if act is not None:
                return act, model, wanted
    raise NotFound(f"there is nothing at {path}")


def _decoded(segment: str) -> str:
    try:
        return unquote_to_bytes(segment.encode("latin-1")).decode()
    except UnicodeDecodeError as error:
        raise InvalidRequest("the path is not UTF-8 once its percent-encoding is undone") from error


def _check_encoding(headers: Mapping[bytes, bytes]) -> None:
    kind = headers.get(b"content-type", b"")
    if kind not in _BODY_TYPES and kind.partition(b";")[0].strip().lower() not in _BODY_TYPES:
        raise UnsupportedEncoding(
            f"content type {kind.decode('latin-1')!r} is neither JSON nor application/octet-stream"
        )
    coding = headers.get(b"content-encoding")
    if coding is not None and coding.lower() not in (b"identity", b""):
        raise UnsupportedEncoding(
            f"content encoding {coding.decode('latin-1')!r} is not supported, send the body as it is"
        )


def _header_length(value: bytes) -> int:
    # int() would also take signs, spaces and underscores.
    if not value.isdigit() or len(value) > 18:
        raise InvalidRequest(f"inference-header-content-length {value.decode('latin-1')!r} is not a number of bytes")
    return int(value)


def _deadline(value: bytes) -> float:
    """Monotonic seconds at which `value` milliseconds will have passed."""
    try:
        remaining = float(value)
    except ValueError:
        remaining = float("nan")
    if not isfinite(remaining):
        raise InvalidRequest(f"tierline-deadline-ms {value.decode('latin-1')!r} is not a number of milliseconds")
    return time.monotonic() + remaining / 1e3


def _json(value: object) -> HttpResponse:
    return HttpResponse(200, JSON, msgspec.json.encode(value))


def _version() -> str:
    try:
        return version("tierline")
    except PackageNotFoundError:
        return "0"
