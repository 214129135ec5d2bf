"""The port of the metrics, over a real socket, and the trace of a request over REST."""

from __future__ import annotations

import asyncio
import json

import numpy as np
import pytest
from meter_fakes import Index, Scripted, ask

from models.serving.exchange import HttpHead, HttpRequest, HttpResponse
from models.serving.http.server import serve_http
from models.serving.meter.endpoint import metrics_handler
from models.serving.meter.meter import Meter
from models.serving.meter.registry import Registry
from models.serving.meter.trace import Tracer, parse
from models.serving.plane import DataPlane
from models.serving.predictor import InferResponse
from models.serving.rest import RestHandler

INCOMING = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01"


async def fetch(host: str, port: int, request: str) -> tuple[int, dict[str, str], bytes]:
    async with asyncio.timeout(5):
        reader, writer = await asyncio.open_connection(host, port)
        writer.write(f"{request} HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n".encode())
        head, _, body = (await reader.read()).partition(b"\r\n\r\n")
        writer.close()
    status, *lines = head.decode().split("\r\n")
    return int(status.split()[1]), dict(line.lower().split(": ", 1) for line in lines), body


@pytest.fixture
def tracer() -> Tracer:
    return Tracer(rate=0.0)


async def test_a_scraper_finds_what_was_counted(
    registry: Registry, tracer: Tracer, scripted: Scripted, index: Index
) -> None:
    meter = Meter(scripted, registry, index, tier="edge", tracer=tracer)
    for trace in (None, INCOMING):
        await meter.infer(ask(trace=trace))
    async with serve_http(metrics_handler(registry, tracer)) as server:
        status, headers, body = await fetch(server.host, server.port, "GET /metrics")
        assert (status, headers["content-type"]) == (200, "text/plain; version=0.0.4; charset=utf-8")
        assert b'\ninference_request_count_total{model="m",version="2",tier="edge"} 2\n' in body
        status, _, body = await fetch(server.host, server.port, "GET /traces")
        (span,) = json.loads(body)
        assert (status, span["trace"], span["sampled"], span["model"]) == (200, INCOMING[3:35], True, "m")
        status, headers, body = await fetch(server.host, server.port, "HEAD /metrics")
        assert (status, body) == (200, b"")


async def test_the_newest_trace_comes_first(
    registry: Registry, tracer: Tracer, scripted: Scripted, index: Index
) -> None:
    meter = Meter(scripted, registry, index, tier="edge", tracer=tracer)
    for parent in ("1" * 16, "2" * 16):
        await meter.infer(ask(trace=f"00-{'a' * 32}-{parent}-00"))
    answer = await metrics_handler(registry, tracer)(HttpRequest(HttpHead("GET", "/traces", "", {})))
    assert [span["parent"] for span in json.loads(answer.body)] == ["2" * 16, "1" * 16]  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("GET", "/", 404),
        ("GET", "/metrics/x", 404),
        ("GET", "/v2", 404),
        ("POST", "/metrics", 405),
        ("GET", "/metrics/", 200),
    ],
)
async def test_nothing_else_is_there(registry: Registry, method: str, path: str, status: int) -> None:
    answer = await metrics_handler(registry)(HttpRequest(HttpHead(method, path, "", {})))
    assert answer.status == status
    if status != 200:
        assert set(json.loads(answer.body)) == {"error"}  # type: ignore[arg-type]


async def test_without_a_tracer_there_are_no_traces(registry: Registry) -> None:
    answer = await metrics_handler(registry)(HttpRequest(HttpHead("GET", "/traces", "", {})))
    assert answer.body == b"[]"


@pytest.mark.parametrize("incoming", [None, INCOMING, "broken"])
async def test_a_rest_answer_carries_a_trace_exactly_when_its_request_did(
    registry: Registry, tracer: Tracer, scripted: Scripted, index: Index, incoming: str | None
) -> None:
    scripted.answer = InferResponse(
        outputs={"y": np.ones(1, np.float32)}, model="m", package="p", version="2", tier="edge"
    )
    meter = Meter(scripted, registry, index, tier="edge", tracer=tracer)
    handler = RestHandler(DataPlane(meter, index, ready=lambda: True))
    headers = {} if incoming is None else {b"traceparent": incoming.encode()}
    body = b'{"inputs":[{"name":"x","datatype":"FP32","shape":[1,4],"data":[1,2,3,4]}]}'
    answer: HttpResponse = await handler(HttpRequest(HttpHead("POST", "/v2/models/m/infer", "", headers), body))
    assert answer.status == 200
    lines = dict(line.split(": ", 1) for line in answer.headers.decode().splitlines())
    if incoming is None:
        assert "traceparent" not in lines
    else:
        found = parse(lines["traceparent"])
        assert found is not None
        assert (found[0] == INCOMING[3:35]) == (incoming == INCOMING)
