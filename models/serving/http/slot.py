"""A request's place in the order of answers, and the head of its answer."""

from __future__ import annotations

import asyncio
import http
import logging
from collections.abc import Callable
from typing import Protocol

from models.serving.drive import Driven
from models.serving.exchange import JSON, HttpRequest, HttpResponse, error_body

log = logging.getLogger("tierline.http")

_CLOSE = b"connection: close\r\n"
_KEEP_ALIVE = b"connection: keep-alive\r\n"
_STATUS_LINES = {status.value: f"HTTP/1.1 {status.value} {status.phrase}\r\n".encode() for status in http.HTTPStatus}


class _Owner(Protocol):
    def answered(self) -> None: ...


class Slot:
    """A request's place in the order of answers."""

    __slots__ = ("connection", "held", "keep_alive", "linger", "old", "request", "response", "task")

    def __init__(self, connection: _Owner, request: HttpRequest | None, keep_alive: bool) -> None:
        self.connection = connection
        self.request = request
        self.keep_alive = keep_alive
        self.held: Callable[[], None] | None = None  # lets go of the body's share of the server's memory
        self.old = False
        self.linger = False
        self.response: HttpResponse | None = None
        self.task: Driven[HttpResponse] | None = None

    def done(self, response: HttpResponse | None, error: BaseException | None) -> None:
        if response is None:
            if not isinstance(error, asyncio.CancelledError):
                log.error("a handler failed", exc_info=error)
            response = HttpResponse(500, JSON, error_body("internal error"))
        self.response = response
        self.task = None  # it has this object's method: the two would keep each other, and the body, until a collection
        if self.held is not None:
            self.let_go()
        self.connection.answered()

    def let_go(self) -> None:
        held, self.held = self.held, None
        if held is not None:
            held()


def answer_head(date: bytes, slot: Slot, response: HttpResponse, length: int, closing: bool) -> bytes:
    """Status line and headers, up to and with the empty line. `date`: a whole header line."""
    connection = _CLOSE if closing else _KEEP_ALIVE if slot.old else b""
    return b"%b%bcontent-length: %d\r\n%b%b\r\n" % (
        _STATUS_LINES[response.status],
        date,
        length,
        response.headers,
        connection,
    )


def upgrade_head(date: bytes, response: HttpResponse) -> bytes:
    """Of a 101, which has no body and no length. `response.headers` name the protocol."""
    return b"%b%b%bconnection: Upgrade\r\n\r\n" % (_STATUS_LINES[response.status], date, response.headers)


def encode_answer(
    date: bytes, slot: Slot, response: HttpResponse, body: bytes | list[bytes], closing: bool, out: list[bytes]
) -> int:
    """Append the whole answer to `out`; returns the length of the body that was appended."""
    length = len(body) if isinstance(body, bytes) else sum(map(len, body))
    out.append(answer_head(date, slot, response, length, closing))
    if slot.request is not None and slot.request.head.method == "HEAD":
        return 0
    if isinstance(body, bytes):
        out.append(body)
    else:
        out += body
    return length


def path_of_absolute(target: str) -> str:
    """The path of `http://host/path`, which a server must accept (RFC 9112 3.2.2); anything else stays as it is."""
    _, mark, rest = target.partition("://")
    if not mark:
        return target
    _, slash, path = rest.partition("/")
    return slash + path or "/"
