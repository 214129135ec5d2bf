"""The tier above as a predictor: by the deadline, never on a spoiled connection, in our own errors."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress
from typing import Any

import numpy as np
import pytest

from models.errors import (
    CallerError,
    DeadlineExceeded,
    EngineFailure,
    InvalidRequest,
    NotFound,
    NotReady,
    Overloaded,
    TierlineError,
    Unauthenticated,
    Unreachable,
)
from models.serving.endpoint import Endpoint
from models.serving.exchange import Handler, HttpRequest, HttpResponse, error_response
from models.serving.http.server import serve_http
from models.serving.plane import DataPlane
from models.serving.predictor import InferRequest
from models.serving.remote import Remote
from models.serving.reply import MAX_RESPONSE_HEAD_BYTES
from models.serving.rest import RestHandler
from models.serving.wire import MAX_WAITING, Pool
from models.testing import FailingPredictor, SlowPredictor, StaticPredictor

X = {"x": np.arange(3, dtype=np.float32)}


def ask(timeout: float = 2.0, **more: Any) -> InferRequest:
    return InferRequest(model="m ü/1", inputs=X, deadline=time.monotonic() + timeout, **more)


@asynccontextmanager
async def remote_of(handler: Handler, **options: Any) -> AsyncIterator[Remote]:
    async with serve_http(handler, drain_seconds=0.05) as server:
        remote = Remote(server.url, tier="cloud", **options)
        try:
            yield remote
        finally:
            await remote.close()


def rest(predictor: Any, ready: bool = True) -> Handler:
    return RestHandler(DataPlane(predictor, None, ready=lambda: ready)).__call__  # type: ignore[arg-type]


async def test_an_answer_arrives_with_its_marks() -> None:
    predictor = StaticPredictor(X, confidence=0.5)
    async with remote_of(rest(predictor)) as remote:
        answer = await remote.infer(ask(id="ü", version="4", min_confidence=0.25, trace="00-ab-cd-01"))
    assert answer.outputs["x"].tolist() == [0, 1, 2]
    assert (answer.model, answer.package, answer.tier, answer.confidence, answer.id) == (
        "m ü/1",
        "fake",
        "edge",
        0.5,
        "ü",
    )
    got = predictor.requests[0]
    assert (got.model, got.version, got.min_confidence, got.trace) == ("m ü/1", "4", 0.25, "00-ab-cd-01")
    assert got.deadline is not None
    assert got.deadline <= time.monotonic() + 2


async def test_the_token_travels_as_a_bearer_token() -> None:
    seen = []

    async def handler(request: HttpRequest) -> HttpResponse:
        seen.append(request.headers.get(b"authorization"))
        return HttpResponse(200)

    async with remote_of(handler, token="s3cret") as remote:
        await remote.ping(1)
    assert seen == [b"Bearer s3cret"]


@pytest.mark.parametrize(
    ("status", "kind"),
    [
        (400, InvalidRequest),
        (401, Unauthenticated),
        (404, NotFound),
        (418, CallerError),
        (429, Overloaded),
        (500, EngineFailure),
        (502, Unreachable),
        (503, NotReady),
        (504, DeadlineExceeded),
        (302, Unreachable),
    ],
)
async def test_a_status_becomes_the_error_it_stands_for(status: int, kind: type[TierlineError]) -> None:
    async def handler(request: HttpRequest) -> HttpResponse:
        return HttpResponse(status, body=b'{"error":"because"}')

    async with remote_of(handler) as remote:
        with pytest.raises(TierlineError, match="because") as caught:
            await remote.infer(ask())
    assert type(caught.value) is kind


async def test_retry_after_is_believed() -> None:
    async def handler(request: HttpRequest) -> HttpResponse:
        return error_response(Overloaded("busy", 7.5))

    async with remote_of(handler) as remote:
        with pytest.raises(Overloaded) as caught:
            await remote.infer(ask())
    assert caught.value.retry_after == 8


async def test_an_error_without_our_body_is_still_an_error() -> None:
    async def handler(request: HttpRequest) -> HttpResponse:
        return HttpResponse(400, body=b"<html>")

    async with remote_of(handler) as remote:
        with pytest.raises(InvalidRequest, match="status 400"):
            await remote.infer(ask())


async def test_the_deadline_is_kept_whatever_the_server_does() -> None:
    slow = SlowPredictor(StaticPredictor(X))
    async with remote_of(rest(slow)) as remote:
        start = time.monotonic()
        with pytest.raises(DeadlineExceeded):
            await remote.infer(ask(0.05))
        assert time.monotonic() - start < 0.5
        await asyncio.wait_for(dropped(slow), 2)
        slow.release.set()
        assert (await remote.infer(ask())).tier == "edge"


async def dropped(slow: SlowPredictor) -> None:
    while not slow.cancelled:
        await asyncio.get_running_loop().run_in_executor(None, int)


async def test_a_deadline_in_the_past_sends_nothing() -> None:
    predictor = StaticPredictor(X)
    async with remote_of(rest(predictor)) as remote:
        with pytest.raises(DeadlineExceeded):
            await remote.infer(ask(-1))
    assert not predictor.requests


async def test_cancelling_closes_the_connection() -> None:
    slow = SlowPredictor(StaticPredictor(X))
    async with remote_of(rest(slow)) as remote:
        call = asyncio.ensure_future(remote.infer(ask()))
        await slow.asked.wait()
        call.cancel()
        with pytest.raises(asyncio.CancelledError):
            await call
        await asyncio.wait_for(dropped(slow), 2)


async def test_who_finds_no_free_connection_waits_until_the_deadline() -> None:
    slow = SlowPredictor(StaticPredictor(X))
    async with remote_of(rest(slow), max_connections=1) as remote:
        first = asyncio.ensure_future(remote.infer(ask()))
        await slow.asked.wait()
        with pytest.raises(DeadlineExceeded):
            await remote.infer(ask(0.02))
        waiting = asyncio.ensure_future(remote.infer(ask()))
        assert await remote.ping(1) > 0  # a ping does not take a full pool for a dead server
        slow.release.set()
        assert (await first).tier == (await waiting).tier == "edge"


async def test_who_has_given_up_waiting_takes_nobodys_place() -> None:
    began, gone = asyncio.Event(), asyncio.Event()

    async def hang(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        began.set()
        with suppress(ConnectionError):
            await reader.read()  # until the client has gone
        writer.close()
        gone.set()

    server = await asyncio.start_server(hang, "127.0.0.1", 0)
    pool = Pool(Endpoint("127.0.0.1", server.sockets[0].getsockname()[1]), size=1, connect_timeout=1)
    loop, parts = asyncio.get_running_loop(), [b"GET / HTTP/1.1\r\n\r\n"]
    long = asyncio.ensure_future(pool.exchange(parts, loop.time() + 60))
    try:
        await began.wait()
        late = loop.time() - 1
        given_up = await asyncio.gather(
            *(pool.exchange(parts, late) for _ in range(MAX_WAITING)), return_exceptions=True
        )
        assert {type(error) for error in given_up} == {DeadlineExceeded}
        with pytest.raises(DeadlineExceeded):
            await pool.exchange(parts, late)
        left = asyncio.ensure_future(pool.exchange(parts, loop.time() + 60))
        await asyncio.sleep(0)
        left.cancel()
        await asyncio.wait((left,))
        assert not pool._waiting
    finally:
        long.cancel()
        await asyncio.wait((long,))
        await gone.wait()
        pool.close()
        server.close()
        await server.wait_closed()


async def test_ping_tells_not_ready_from_unreachable() -> None:
    async with remote_of(rest(FailingPredictor(NotFound("x")), ready=False)) as remote:
        with pytest.raises(NotReady):
            await remote.ping(1)
    with pytest.raises(Unreachable):
        await remote.ping(1)


async def test_nobody_listening_is_unreachable() -> None:
    async with serve_http(rest(StaticPredictor(X))) as server:
        remote = Remote(server.url, tier="cloud")
    with pytest.raises(Unreachable, match=str(server.port)):
        await remote.infer(ask())


Script = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]


@asynccontextmanager
async def scripted(script: Script) -> AsyncIterator[Remote]:
    """A server that answers each connection by `script`."""

    async def run(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            await script(reader, writer)
        finally:
            writer.close()

    server = await asyncio.start_server(run, "127.0.0.1", 0)
    remote = Remote(f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}/", tier="cloud")
    try:
        yield remote
    finally:
        await remote.close()
        server.close()
        await server.wait_closed()


READY = b"HTTP/1.1 200 OK\r\ncontent-length: 0\r\n\r\n"


async def test_a_kept_connection_that_the_server_closed_is_replaced_once() -> None:
    served = []

    async def once(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        served.append(1)
        writer.write(READY)
        if len(served) == 1:
            await reader.readuntil(b"\r\n\r\n")  # then closes without a byte

    async with scripted(once) as remote:
        await remote.ping(1)
        await remote.ping(1)
    assert len(served) == 2


async def test_a_new_connection_that_is_closed_is_not_retried() -> None:
    tries = []

    async def never(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        tries.append(1)
        await reader.readuntil(b"\r\n\r\n")

    async with scripted(never) as remote:
        with pytest.raises(Unreachable):
            await remote.infer(ask())
    assert len(tries) == 1


@pytest.mark.parametrize(
    "answer",
    [
        b"nonsense\r\n\r\n",
        b"HTTP/1.1 200 OK\r\ncontent-length: 9\r\n\r\n{}",
        b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\n{}",
        b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\ninference-header-content-length: 99\r\n\r\n{}",
        b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\ninference-header-content-length: x\r\n\r\n{}",
        b"HTTP/1.1 101 Switching\r\nconnection: upgrade\r\nupgrade: x\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nx: " + b"y" * 4 * MAX_RESPONSE_HEAD_BYTES,
    ],
)
async def test_a_broken_answer_counts_as_none(answer: bytes) -> None:
    async def broken(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(answer)
        await writer.drain()

    async with scripted(broken) as remote:
        with pytest.raises(Unreachable):
            await remote.infer(ask())


async def test_an_answer_to_no_question_spoils_the_connection() -> None:
    connections = []

    async def twice(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        connections.append(1)
        while True:
            await reader.readuntil(b"\r\n\r\n")
            writer.write(READY + READY)

    async with scripted(twice) as remote:
        await remote.ping(1)
        await remote.ping(1)
    assert len(connections) == 2


@pytest.mark.parametrize("url", ["https://h", "h:1", "http://", "http://u:p@h", "http://h?x", "http://h:x"])
def test_a_url_that_cannot_be_used_is_refused_at_once(url: str) -> None:
    with pytest.raises(ValueError):
        Remote(url, tier="cloud")


async def test_an_ipv6_literal_is_understood() -> None:
    try:
        serving = serve_http(rest(StaticPredictor(X)), host="::1")
        server = await serving.__aenter__()
    except OSError:
        pytest.skip("no IPv6 here")
    remote = Remote(server.url, tier="cloud")
    assert await remote.ping(1) > 0
    await remote.close()
    await serving.__aexit__(None, None, None)
