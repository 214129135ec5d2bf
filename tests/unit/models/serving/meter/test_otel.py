"""Spans reach a real collector over HTTP as OTLP protobuf; a collector that is gone costs spans, never an answer."""

from __future__ import annotations

import asyncio
import builtins
import threading
import time
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from typing import Any

import pytest
from meter_fakes import Clock, Index, Scripted, ask
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest

from models.errors import EngineFailure
from models.serving.exchange import OCTETS, HttpRequest, HttpResponse
from models.serving.http.server import serve_http
from models.serving.meter import otel
from models.serving.meter.meter import Meter
from models.serving.meter.otel import BATCH, MAX_WAITING, OtlpSender, SpanExporter, exporting
from models.serving.meter.registry import Registry
from models.serving.meter.trace import Span, Tracer

SAMPLED = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01"
SPAN = Span(Tracer().join(SAMPLED), time.time_ns(), 0.25, "m", "1", "edge", "local")


class Collector:
    """What a real one would have been sent."""

    def __init__(self) -> None:
        self.paths: list[str] = []
        self.requests: list[ExportTraceServiceRequest] = []
        self.url = ""

    async def __call__(self, request: HttpRequest) -> HttpResponse:
        self.paths.append(request.path)
        assert request.headers[b"content-type"] == b"application/x-protobuf"
        self.requests.append(ExportTraceServiceRequest.FromString(request.body))
        return HttpResponse(200, OCTETS, b"")

    def spans(self) -> list[Any]:
        return [
            span
            for each in self.requests
            for group in each.resource_spans
            for s in group.scope_spans
            for span in s.spans
        ]


@asynccontextmanager
async def collecting() -> AsyncIterator[Collector]:
    collector = Collector()
    async with serve_http(collector) as server:
        collector.url = server.url
        yield collector


class Sends:
    """A sender that does what it is told. `gate`: set = go on; `batches`: sizes of what it was given."""

    def __init__(self, act: Callable[[], bool] = lambda: True) -> None:
        self.act = act
        self.gate = threading.Event()
        self.gate.set()
        self.asked = threading.Event()
        self.batches: list[int] = []

    def send(self, spans: Sequence[Span]) -> bool:
        self.asked.set()
        assert self.gate.wait(10)
        self.batches.append(len(spans))
        return self.act()

    def close(self) -> None:
        self.gate.set()


async def test_sampled_and_failed_requests_reach_the_collector(
    registry: Registry, scripted: Scripted, index: Index, clock: Clock
) -> None:
    async with collecting() as collector:
        async with exporting(collector.url, service_instance_id="node-7") as exporter:
            tracer = Tracer(rate=0.0, export=exporter.offer)
            meter = Meter(scripted, registry, index, tier="edge", tracer=tracer, clock=clock)
            await meter.infer(ask(trace=SAMPLED))
            await meter.infer(ask(trace=SAMPLED[:-1] + "0"))
            await meter.infer(ask())
            scripted.answer = EngineFailure("x")
            with pytest.raises(EngineFailure):
                await meter.infer(ask())
        good, bad = collector.spans()
        resource = {
            each.key: each.value.string_value for each in collector.requests[0].resource_spans[0].resource.attributes
        }
    assert (exporter.exported, exporter.dropped, set(collector.paths)) == (2, 0, {"/v1/traces"})
    assert (resource["service.name"], resource["service.instance.id"]) == ("tierline", "node-7")
    kept = tracer.recent()[0]
    assert good.trace_id.hex() == SAMPLED[3:35]
    assert good.parent_span_id.hex() == SAMPLED[36:52]
    assert good.span_id.hex() == kept.context.span
    assert (good.name, good.kind, good.status.code) == ("infer m", 2, 0)
    assert good.end_time_unix_nano - good.start_time_unix_nano == pytest.approx(2_000_000, abs=1)
    attributes = {each.key: each.value for each in good.attributes}
    assert attributes["inference.version"].string_value == "2"
    assert attributes["inference.compute.duration"].double_value == pytest.approx(0.001)
    assert "error.type" not in attributes
    assert (bad.parent_span_id, bad.status.code, bad.status.message) == (b"", 2, "engine_failure")
    assert {each.key: each.value.string_value for each in bad.attributes}["error.type"] == "engine_failure"


async def test_an_endpoint_with_a_path_is_taken_as_it_is() -> None:
    async with collecting() as collector, exporting(collector.url + "/custom") as exporter:
        exporter.offer(SPAN)
        await asyncio.to_thread(exporter.close)
    assert collector.paths == ["/custom"]


@pytest.mark.parametrize("endpoint", ["", "collector:4317", "ftp://x", "http://", "/v1/traces"])
def test_an_endpoint_that_is_no_url_is_refused(endpoint: str) -> None:
    with pytest.raises(ValueError, match="trace endpoint"):
        OtlpSender(endpoint, {})


def test_a_missing_library_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    real = builtins.__import__

    def refuse(name: str, *rest: Any) -> Any:
        if name.startswith("opentelemetry"):
            raise ImportError(name)
        return real(name, *rest)

    monkeypatch.setattr(builtins, "__import__", refuse)
    with pytest.raises(ImportError, match=r"tierline\[otel\]"):
        OtlpSender("http://127.0.0.1:1", {})


def test_a_full_queue_drops_and_counts_but_never_waits() -> None:
    sender = Sends()
    sender.gate.clear()
    exporter = SpanExporter(sender)
    exporter.start()
    for _ in range(BATCH):
        exporter.offer(SPAN)
    assert sender.asked.wait(10)
    for _ in range(MAX_WAITING + 7):
        exporter.offer(SPAN)
    assert exporter.dropped == 7
    sender.gate.set()
    exporter.close()
    assert exporter.exported == BATCH + MAX_WAITING
    assert max(sender.batches) == BATCH


@pytest.mark.parametrize("fault", [False, ZeroDivisionError("x")], ids=["refused", "broken"])
def test_a_collector_that_is_gone_costs_its_spans_and_is_reported_once(
    fault: bool | Exception, caplog: pytest.LogCaptureFixture
) -> None:
    def act() -> bool:
        if isinstance(fault, Exception):
            raise fault
        return fault

    exporter = SpanExporter(Sends(act))
    for _ in range(3 * BATCH):
        exporter.offer(SPAN)
    exporter.start()
    exporter.close()
    assert (exporter.exported, exporter.dropped) == (0, 3 * BATCH)
    assert [record.message for record in caplog.records].count("the trace collector does not take spans") == 1


def test_stopping_does_not_wait_for_a_collector_that_hangs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(otel, "TIMEOUT_SECONDS", 0.05)
    sender = Sends()
    sender.gate.clear()
    exporter = SpanExporter(sender)
    exporter.offer(SPAN)
    exporter.start()
    start = time.monotonic()
    exporter.close()
    assert time.monotonic() - start < 5.0
