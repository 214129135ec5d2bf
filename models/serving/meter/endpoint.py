"""`GET /metrics` for a scraper and `GET /traces` for a person, on a port of their own."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable, Mapping

import msgspec

from models.errors import MethodNotAllowed, NotFound, TierlineError
from models.serving.exchange import JSON, Handler, HttpRequest, HttpResponse, error_response, header_lines
from models.serving.meter.prometheus import CONTENT_TYPE, render
from models.serving.meter.registry import Registry
from models.serving.meter.trace import Span, Tracer

_TEXT = header_lines([("content-type", CONTENT_TYPE)])


def metrics_handler(registry: Registry, tracer: Tracer | None = None) -> Handler:
    """A handler for `models.serving.http.server.serve_http`. `/traces`: the spans remembered, newest first, as JSON."""

    async def handle(request: HttpRequest) -> HttpResponse:
        try:
            path = request.path.rstrip("/")
            if path not in ("/metrics", "/traces"):
                raise NotFound(f"there is nothing at {request.path}: this port has /metrics and /traces")
            if request.method not in ("GET", "HEAD"):
                raise MethodNotAllowed(f"{request.path} takes GET or HEAD, not {request.method}")
        except TierlineError as error:
            return error_response(error)
        # Many models make a page of thousands of lines: writing it in the loop would show in every caller's latency.
        if path == "/metrics":
            await registry.refresh()
            return HttpResponse(200, _TEXT, await asyncio.to_thread(render, registry.collect()))
        return HttpResponse(200, JSON, await asyncio.to_thread(_spans, tracer.recent() if tracer else ()))

    return handle


def _spans(spans: Iterable[Span]) -> bytes:
    return msgspec.json.encode([_shown(span) for span in spans][::-1])


def _shown(span: Span) -> Mapping[str, object]:
    fields: dict[str, object] = span._asdict()
    del fields["context"]
    return {**span.context._asdict(), **fields}
