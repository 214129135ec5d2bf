"""The ASGI twin: what the specification asks of an application, and the limits of our own front."""

from __future__ import annotations

import asyncio
import logging
from pathlib import Path
from typing import Any

import pytest

from models.errors import NotFound
from models.serving.asgi import AsgiApp
from models.serving.caller import Peer
from models.serving.exchange import FileBody, HttpRequest, HttpResponse, Upgrade
from models.serving.http.file import PIECE_BYTES
from models.serving.http.service import HttpLimits

SCOPE = {
    "type": "http",
    "method": "POST",
    "path": "/a b",
    "raw_path": b"/a%20b",
    "query_string": b"c=d",
    "headers": [(b"x", b"1"), (b"x", b"2")],
    "client": ("127.0.0.1", 5),
}


async def ask(app: AsgiApp, *pieces: bytes, **scope: Any) -> tuple[int, dict[bytes, bytes], bytes, int]:
    """Status, headers, body, and in how many pieces the body came."""
    messages = [{"type": "http.request", "body": piece, "more_body": True} for piece in pieces]
    messages.append({"type": "http.request"})
    sent: list[Any] = []

    async def receive() -> Any:
        return messages.pop(0)

    async def send(message: Any) -> None:
        sent.append(message)

    await app({**SCOPE, **scope}, receive, send)
    start, *rest = sent
    assert [message.get("more_body", False) for message in rest] == [True] * (len(rest) - 1) + [False]
    return start["status"], dict(start["headers"]), b"".join(message["body"] for message in rest), len(rest)


def app_of(response: HttpResponse | Exception, limits: HttpLimits | None = None) -> tuple[AsgiApp, list[HttpRequest]]:
    seen = []

    async def handler(request: HttpRequest) -> HttpResponse:
        seen.append(request)
        if isinstance(response, Exception):
            raise response
        return response

    return AsgiApp(handler, limits or HttpLimits()), seen


async def test_the_handler_sees_what_was_sent() -> None:
    app, seen = app_of(HttpResponse(200, b"a: b\r\nc: d:e\r\n", [b"x", b"y"]))
    assert await ask(app, b"he", b"", b"llo") == (200, {b"content-length": b"2", b"a": b"b", b"c": b"d:e"}, b"xy", 1)
    request = seen[0]
    assert (request.method, request.path, request.query, request.body) == ("POST", "/a%20b", "c=d", b"hello")
    assert request.headers == {b"x": b"2"}
    assert request.peer == Peer()


@pytest.mark.parametrize(
    ("scope", "peer"),
    [
        ({"client": None}, Peer("unix")),
        ({"client": ("10.1.2.3", 4), "scheme": "https"}, Peer("10.1.2.3", encrypted=True)),
    ],
)
async def test_the_peer_is_who_connected(scope: dict[str, Any], peer: Peer) -> None:
    app, seen = app_of(HttpResponse(200))
    await ask(app, **scope)
    assert seen[0].peer == peer


async def test_a_server_without_raw_paths_is_understood() -> None:
    app, seen = app_of(HttpResponse(200))
    await ask(app, raw_path=None, path="/v2/models/ä")
    assert seen[0].path == "/v2/models/ä".encode().decode("latin-1")


async def test_head_has_the_length_and_no_body() -> None:
    app, _ = app_of(HttpResponse(200, b"", b"12345"))
    assert await ask(app, method="HEAD") == (200, {b"content-length": b"5"}, b"", 1)


@pytest.mark.parametrize("announced", [True, False])
async def test_a_body_above_the_limit_is_refused(announced: bool) -> None:
    app, seen = app_of(HttpResponse(200), HttpLimits(body_bytes=10))
    headers = [(b"content-length", b"11")] if announced else []
    assert (await ask(app, *([] if announced else [b"123456"] * 2), headers=headers))[0] == 413
    assert (await ask(app, b"12345", b"12345", headers=[(b"content-length", b"10")]))[0] == 200
    assert len(seen) == 1


@pytest.mark.parametrize("headers", [[(b"x", b"y" * 100)], [(b"x%d" % n, b"") for n in range(9)]])
async def test_headers_above_the_limit_are_refused(headers: list[tuple[bytes, bytes]]) -> None:
    app, seen = app_of(HttpResponse(200), HttpLimits(header_bytes=90, header_count=8))
    assert (await ask(app, headers=headers))[0] == 413
    assert not seen


async def test_errors_leave_as_json_and_what_nobody_expected_is_logged(caplog: pytest.LogCaptureFixture) -> None:
    assert (await ask(app_of(NotFound("no x"))[0]))[::2] == (404, b'{"error":"no x"}')
    with caplog.at_level(logging.ERROR):
        assert (await ask(app_of(KeyError("a secret"))[0]))[::2] == (500, b'{"error":"internal error"}')
    assert "a secret" in caplog.text


async def test_no_protocol_is_changed_to() -> None:
    app, _ = app_of(HttpResponse(101, b"", Upgrade(asyncio.Protocol)))
    assert (await ask(app))[0] == 400


async def test_a_file_is_sent_in_pieces(tmp_path: Path) -> None:
    data = bytes(range(256)) * (PIECE_BYTES // 256) + b"end"
    file = tmp_path / "file"
    file.write_bytes(b"begin" + data)
    app, _ = app_of(HttpResponse(200, b"", FileBody(file, 5, len(data))))
    length = {b"content-length": b"%d" % len(data)}
    assert await ask(app) == (200, length, data, 3)
    assert await ask(app, method="HEAD") == (200, length, b"", 1)
    assert (await ask(app_of(HttpResponse(200, b"", FileBody(tmp_path / "none", 0, 9)))[0]))[0] == 500
    with pytest.raises(EOFError):
        await ask(app_of(HttpResponse(200, b"", FileBody(file, 0, 2 * len(data))))[0])


async def test_a_client_that_went_away_is_not_answered() -> None:
    app, seen = app_of(HttpResponse(200))
    sent: list[Any] = []

    async def receive() -> Any:
        return {"type": "http.disconnect"}

    async def send(message: Any) -> None:
        sent.append(message)

    await app(SCOPE, receive, send)
    assert not seen
    assert not sent


async def test_lifespan_begins_and_ends_at_once() -> None:
    app, _ = app_of(HttpResponse(200))
    stages = ["startup", "shutdown"]
    sent: list[Any] = []

    async def receive() -> Any:
        return {"type": f"lifespan.{stages.pop(0)}"}

    async def send(message: Any) -> None:
        sent.append(message["type"])

    await app({"type": "lifespan"}, receive, send)
    assert sent == ["lifespan.startup.complete", "lifespan.shutdown.complete"]
    with pytest.raises(NotImplementedError):
        await app({"type": "websocket"}, receive, send)
