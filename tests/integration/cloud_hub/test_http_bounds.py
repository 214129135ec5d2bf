"""Connections that say nothing, and heads without end, against the hub's real server."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import pytest

from cloud_hub import http_bounds, server


async def echo(scope: Any, receive: Any, send: Any) -> None:
    size, more = 0, True
    while more:
        event = await receive()
        size, more = size + len(event.get("body", b"")), event.get("more_body", False)
    await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"7")]})
    await send({"type": "http.response.body", "body": b"%7d" % size})


@asynccontextmanager
async def serving() -> AsyncIterator[int]:
    listener = socket.create_server(("127.0.0.1", 0))
    async with server._serving(echo, listener, None):
        yield int(listener.getsockname()[1])


async def talk(port: int, *pieces: bytes) -> bytes:
    """All that comes until the other side closes."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    try:
        for piece in pieces:
            writer.write(piece)
            await writer.drain()
        async with asyncio.timeout(10):
            return await reader.read()
    except ConnectionError:
        return b""
    finally:
        writer.close()


@pytest.mark.parametrize("said", [b"", b"GET / HTTP/1.1\r\nx: y", b"\r\n"])
async def test_a_connection_that_does_not_get_to_the_point_is_ended(
    said: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(http_bounds, "HEAD_SECONDS", 0.1)
    async with serving() as port:
        assert b" 200 " not in await talk(port, said)


async def test_the_second_request_of_a_connection_is_held_to_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(http_bounds, "HEAD_SECONDS", 0.3)
    async with serving() as port:
        got = await talk(port, b"GET / HTTP/1.1\r\n\r\n", b"GET / HTTP/1.1\r\nx")
        assert got.count(b" 200 ") == 1


@pytest.mark.parametrize("line", [b"x: " + b"y" * 200 + b"\r\n", b"y" * 200])
async def test_headers_without_end_are_refused(line: bytes) -> None:
    async with serving() as port:
        got = await talk(port, b"GET / HTTP/1.1\r\nz: ", *[line * 100 for _ in range(100)])
        assert b" 200 " not in got


async def test_large_bodies_and_many_requests_on_one_connection_are_no_heads(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(http_bounds, "HEAD_SECONDS", 0.5)
    size = 3 * http_bounds.MAX_HEAD_BYTES
    request = b"POST / HTTP/1.1\r\ncontent-length: %d\r\n\r\n" % size + b"b" * size
    last = b"GET / HTTP/1.1\r\nconnection: close\r\n\r\n"
    async with serving() as port:
        got = await talk(port, *[request] * 5, last)
        assert got.count(b"%7d" % size) == 5
        assert got.count(b" 200 ") == 6
