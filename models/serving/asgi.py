"""The same pure handler as an ASGI 3 application: the fallback where our own HTTP front cannot run, and its reference in tests.

Source: the ASGI specification 3.0, "HTTP & WebSocket" and "Lifespan". Answers are those of `models.serving.http`; connections,
times and the order of pipelined answers are the ASGI server's affair. WebSocket is not offered.
"""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable, Iterable, Mapping, MutableMapping
from typing import Any

from models.errors import InvalidRequest, TierlineError
from models.serving.caller import LOCAL_PEER, Peer
from models.serving.exchange import (
    JSON,
    FileBody,
    Handler,
    HttpHead,
    HttpRequest,
    HttpResponse,
    Upgrade,
    error_body,
    error_response,
)
from models.serving.http.body import body_too_large, head_too_large
from models.serving.http.file import read_pieces
from models.serving.http.service import HttpLimits

log = logging.getLogger("tierline.asgi")

Scope = Mapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]


class AsgiApp:
    """An ASGI 3 application around `handler`. Of `limits` those on headers and body count here.

    `uvicorn.run(AsgiApp(handler))` serves it.
    """

    def __init__(self, handler: Handler, limits: HttpLimits = HttpLimits()) -> None:  # noqa: B008 - frozen
        self._handler = handler
        self._limits = limits

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one scope. Raises NotImplementedError for one that is neither http nor lifespan, as ASGI asks."""
        if scope["type"] == "lifespan":
            await _live(receive, send)
        elif scope["type"] == "http":
            await self._answer(scope, receive, send)
        else:
            raise NotImplementedError(f"ASGI scope {scope['type']!r}")

    async def _answer(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            response = await self._respond(scope, receive)
        except _Gone:
            return
        except TierlineError as error:
            response = error_response(error)
        except Exception:
            log.exception("a handler failed")
            response = _failed()
        if isinstance(response.body, FileBody):
            await _send_file(scope, response, response.body, send)
        else:
            await _send_whole(scope, response, send)

    async def _respond(self, scope: Scope, receive: Receive) -> HttpResponse:
        head = _head(scope)
        limits = self._limits
        size = len(head.path) + len(head.query) + sum(len(name) + len(value) for name, value in scope["headers"])
        if size > limits.header_bytes or len(head.headers) > limits.header_count:
            raise head_too_large(limits)
        body = await _body(head, receive, limits)
        response = await self._handler(HttpRequest(head, body))
        if isinstance(response.body, Upgrade):
            raise InvalidRequest("this server does not change protocols")
        return response


class _Gone(Exception):
    """The client went away while it sent its request."""


def _head(scope: Scope) -> HttpHead:
    raw_path = scope.get("raw_path")
    # Optional in ASGI; `path` has lost its percent-encoding.
    path = scope["path"].encode() if raw_path is None else raw_path.partition(b"?")[0]
    client = scope.get("client")
    address = client[0] if client else "unix"
    return HttpHead(
        scope["method"],
        path.decode("latin-1"),
        scope["query_string"].decode("latin-1"),
        dict(scope["headers"]),
        LOCAL_PEER if address == LOCAL_PEER.address else Peer(address, encrypted=scope.get("scheme") == "https"),
    )


async def _body(head: HttpHead, receive: Receive, limits: HttpLimits) -> bytes:
    announced = head.headers.get(b"content-length", b"")
    if announced.isdigit() and int(announced[:20]) > limits.body_bytes:
        raise body_too_large(limits)
    parts, size, more = [], 0, True
    while more:
        message = await receive()
        if message["type"] == "http.disconnect":
            raise _Gone
        piece = message.get("body", b"")
        more = message.get("more_body", False)
        size += len(piece)
        if size > limits.body_bytes:
            raise body_too_large(limits)
        if piece:
            parts.append(piece)
    return b"".join(parts)


def _start(response: HttpResponse, length: int) -> MutableMapping[str, Any]:
    lines: Iterable[bytes] = response.headers.split(b"\r\n")[:-1]
    pairs = [(name, value.strip()) for name, _, value in (line.partition(b":") for line in lines)]
    headers = [(b"content-length", b"%d" % length), *pairs]
    return {"type": "http.response.start", "status": response.status, "headers": headers}


async def _send_file(scope: Scope, response: HttpResponse, body: FileBody, send: Send) -> None:
    """Raises OSError or EOFError when the file fails after its length was promised: the server then cuts the connection."""
    wanted = body if scope["method"] != "HEAD" else FileBody(body.path, 0, 0)
    begun = False
    try:
        async for piece in read_pieces(wanted):
            if not begun:
                await send(_start(response, body.length))
            begun = True
            await send({"type": "http.response.body", "body": piece, "more_body": True})
    except (OSError, EOFError) as error:
        if begun:
            raise
        log.warning("a file could not be sent: %s", error)
        await _send_whole(scope, _failed(), send)
        return
    if not begun:
        await send(_start(response, body.length))
    await send({"type": "http.response.body", "body": b""})


async def _send_whole(scope: Scope, response: HttpResponse, send: Send) -> None:
    body = response.body
    assert isinstance(body, bytes | list)
    data = body if isinstance(body, bytes) else b"".join(body)
    await send(_start(response, len(data)))
    await send({"type": "http.response.body", "body": b"" if scope["method"] == "HEAD" else data})


def _failed() -> HttpResponse:
    return HttpResponse(500, JSON, error_body("internal error"))


async def _live(receive: Receive, send: Send) -> None:
    for stage in ("startup", "shutdown"):
        message = await receive()
        assert message["type"] == f"lifespan.{stage}"
        await send({"type": f"lifespan.{stage}.complete"})
