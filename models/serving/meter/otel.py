"""Spans to an OpenTelemetry collector (OTLP over HTTP, protobuf), from a thread of its own. The only importer of OpenTelemetry.

Only spans that are sampled or went wrong come here, and turning them into OpenTelemetry's objects (some 30 us each) happens
in the thread: a collector that is slow or gone costs spans, never answers.
"""

from __future__ import annotations

import asyncio
import logging
import threading
from collections import deque
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any, Protocol
from urllib.parse import urlsplit

from models.serving.meter.trace import Span

if TYPE_CHECKING:
    from opentelemetry.sdk.trace import ReadableSpan

log = logging.getLogger("tierline.traces")

MAX_WAITING = 2_048
"""Spans that wait for the thread; beyond, they are dropped."""
BATCH = 256
"""Spans of one call to the collector."""
INTERVAL_SECONDS = 5.0
"""Longest time that a span waits for others."""
TIMEOUT_SECONDS = 5.0
"""Of one call to the collector, its retries included; also how long stopping may take."""
_SERVER = "tierline"


class Sender(Protocol):
    """Sends spans; tells whether the collector took them."""

    def send(self, spans: Sequence[Span]) -> bool: ...
    def close(self) -> None: ...


class SpanExporter:
    """A bounded queue and the thread that empties it. `exported`, `dropped`: spans so far."""

    def __init__(self, sender: Sender) -> None:
        self.exported = 0
        self.dropped = 0
        self._sender = sender
        self._waiting: deque[Span] = deque()
        self._wake = threading.Event()
        self._stopping = False
        self._healthy = True
        self._thread = threading.Thread(target=self._run, name="tierline-traces", daemon=True)

    def offer(self, span: Span) -> None:
        """Hand over a span, in the event loop's thread; never waits."""
        if len(self._waiting) >= MAX_WAITING:
            self.dropped += 1
            return
        self._waiting.append(span)
        if len(self._waiting) >= BATCH:
            self._wake.set()

    def start(self) -> None:
        self._thread.start()

    def close(self) -> None:
        """Send what waits, for at most `TIMEOUT_SECONDS`. Blocks."""
        self._stopping = True
        self._wake.set()
        self._thread.join(TIMEOUT_SECONDS)
        # Ends a call that still tries.
        self._sender.close()

    def _run(self) -> None:
        while not self._stopping:
            self._wake.wait(INTERVAL_SECONDS)
            self._wake.clear()
            self._empty()
        self._empty()

    def _empty(self) -> None:
        while self._waiting:
            batch = [self._waiting.popleft() for _ in range(min(BATCH, len(self._waiting)))]
            sent = self._send(batch)
            if sent:
                self.exported += len(batch)
            else:
                self.dropped += len(batch)
            if sent is not self._healthy:
                self._healthy = sent
                log.warning("the trace collector %s", "takes spans again" if sent else "does not take spans")
            if not sent and self._stopping:
                self.dropped += len(self._waiting)
                self._waiting.clear()

    def _send(self, batch: Sequence[Span]) -> bool:
        try:
            return self._sender.send(batch)
        except Exception:
            log.exception("sending spans failed unexpectedly")
            return False


@asynccontextmanager
async def exporting(endpoint: str, **resource: str) -> AsyncIterator[SpanExporter]:
    """An exporter to the collector at `endpoint` while the context lasts, to be given to a `Tracer` as `export=it.offer`.

    `resource`: attributes of this process with `_` for `.`, for instance `service_instance_id`. Raises ValueError for an
    endpoint that is no http(s) URL, ImportError naming the extra when OpenTelemetry is not installed.
    """
    # Importing OpenTelemetry takes some 0.3 s.
    exporter = SpanExporter(await asyncio.to_thread(OtlpSender, endpoint, resource))
    exporter.start()
    try:
        yield exporter
    finally:
        await asyncio.to_thread(exporter.close)


class OtlpSender:
    """`Sender` over OpenTelemetry's own exporter. `endpoint` without a path gets the standard one, /v1/traces.

    Raises as `exporting` does.
    """

    def __init__(self, endpoint: str, resource: Mapping[str, str]) -> None:
        parts = urlsplit(endpoint)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ValueError(f"trace endpoint {endpoint!r} is not http(s)://host:port")
        try:
            from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
            from opentelemetry.sdk.resources import Resource
        except ImportError as error:
            raise ImportError("exporting traces needs OpenTelemetry: pip install 'tierline[otel]'") from error
        if parts.path in ("", "/"):
            endpoint = parts._replace(path="/v1/traces").geturl()
        attributes = {name.replace("_", "."): value for name, value in resource.items()}
        self._resource = Resource.create({"service.name": _SERVER, **attributes})
        self._exporter = OTLPSpanExporter(endpoint=endpoint, timeout=TIMEOUT_SECONDS)

    def send(self, spans: Sequence[Span]) -> bool:
        from opentelemetry.sdk.trace.export import SpanExportResult

        return self._exporter.export([_readable(span, self._resource) for span in spans]) is SpanExportResult.SUCCESS

    def close(self) -> None:
        self._exporter.shutdown()  # type: ignore[no-untyped-call]


def _readable(span: Span, resource: Any) -> ReadableSpan:
    from opentelemetry.sdk.trace import ReadableSpan
    from opentelemetry.trace import SpanContext, SpanKind, Status, StatusCode, TraceFlags

    def place(name: str, remote: bool) -> SpanContext:
        flags = TraceFlags(TraceFlags.SAMPLED if span.context.sampled else TraceFlags.DEFAULT)
        return SpanContext(int(span.context.trace, 16), int(name, 16), is_remote=remote, trace_flags=flags)

    # OpenTelemetry, trace semantic conventions: error.type; an unanswered request is an error of the server's span.
    status = Status(StatusCode.ERROR, span.error) if span.error else Status(StatusCode.UNSET)
    return ReadableSpan(
        name=f"infer {span.model}",
        context=place(span.context.span, False),
        parent=place(span.context.parent, True) if span.context.parent else None,
        resource=resource,
        attributes=_attributes(span),
        kind=SpanKind.SERVER,
        status=status,
        start_time=span.start,
        end_time=span.start + int(span.seconds * 1e9),
    )


def _attributes(span: Span) -> Mapping[str, str | bool | float]:
    found: dict[str, str | bool | float | None] = {
        "inference.model": span.model,
        "inference.version": span.version or None,
        "inference.tier": span.tier or None,
        "inference.reason": span.reason or None,
        "inference.degraded": span.degraded or None,
        "inference.queue.duration": span.queue,
        "inference.compute.duration": span.compute,
        "error.type": span.error or None,
    }
    return {name: value for name, value in found.items() if value is not None}
