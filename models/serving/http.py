"""HTTP/1.1 for a pure handler: one `asyncio.Protocol` per connection on httptools, made for many small requests.

Answers leave in the order of their requests. All answers that are ready after one read leave in one write. A request whose
answer is ready at once costs no Task (`models.serving.drive`), and no request costs a timer: one sweep a second looks at
every connection's phase. Sources: RFC 9112 (messages), RFC 9110 (semantics).
"""

from __future__ import annotations

import asyncio
import http
import logging
from collections import deque
from email.utils import formatdate
from functools import partial
from pathlib import Path
from typing import cast

import httptools
import msgspec

from models.errors import InvalidRequest, NotReady, TierlineError, TooLarge
from models.serving.drive import drive
from models.serving.exchange import JSON, FileBody, Handler, HttpRequest, HttpResponse, error_body, error_response

log = logging.getLogger("tierline.http")

LINGER_SECONDS = 2
"""How long a refused client may go on sending before it is cut off: closing at once would destroy the refusal on its way."""
FILE_PIECE_BYTES = 256 * 1024
JOIN_BYTES = 64 * 1024
"""Answers up to this size are joined into one write; copying larger ones costs more than handing them over in parts."""

_IDLE, _HEAD, _BODY = range(3)
_CONTINUE = b"HTTP/1.1 100 Continue\r\n\r\n"
_CLOSE = b"connection: close\r\n"
_KEEP_ALIVE = b"connection: keep-alive\r\n"


class HttpLimits(msgspec.Struct, frozen=True):
    """What one server and one connection may take.

    `header_bytes`, `header_count`: request line and headers together. `body_bytes`: of a chunked body the framing counts
    too. `connections`: at once. `pipeline`: requests of one connection in work at once, also the most that are started in
    one turn of the loop. `header_seconds`, `body_seconds`: from first to last byte. `idle_seconds`: between requests.
    `write_seconds`: how long a client may leave an answer unread.
    """

    header_bytes: int = 32 * 1024
    header_count: int = 100
    body_bytes: int = 64 * 1024 * 1024
    connections: int = 1024
    pipeline: int = 32
    header_seconds: int = 10
    body_seconds: int = 60
    idle_seconds: int = 75
    write_seconds: int = 30


class HttpService:
    """What the connections of one server share. `sweep` is to be called once a second."""

    def __init__(self, handler: Handler, limits: HttpLimits, loop: asyncio.AbstractEventLoop) -> None:
        self.handler = handler
        self.limits = limits
        self.loop = loop
        self.connections: set[HttpConnection] = set()
        self.seconds = 0
        self.draining = False
        self.empty = asyncio.Event()  # set when draining has let the last connection go
        self.date = b""
        self._set_date()

    def connect(self) -> HttpConnection:
        return HttpConnection(self)

    def sweep(self) -> None:
        """One second has passed: cut off the connections that took too long."""
        self.seconds += 1
        self._set_date()
        for connection in tuple(self.connections):
            connection.check_time()

    def drain(self) -> None:
        """Close idle connections now and the others after their last answer."""
        self.draining = True
        if not self.connections:
            self.empty.set()
        for connection in tuple(self.connections):
            connection.close_if_idle()

    def forget(self, connection: HttpConnection) -> None:
        self.connections.discard(connection)
        if self.draining and not self.connections:
            self.empty.set()

    def abort(self) -> None:
        for connection in tuple(self.connections):
            connection.abort()

    def _set_date(self) -> None:
        self.date = b"date: %b\r\n" % formatdate(usegmt=True).encode()


class _Slot:
    """A request's place in the order of answers."""

    __slots__ = ("connection", "keep_alive", "linger", "old", "request", "response", "task")

    def __init__(self, connection: HttpConnection, request: HttpRequest | None, keep_alive: bool) -> None:
        self.connection = connection
        self.request = request
        self.keep_alive = keep_alive
        self.old = False
        self.linger = False
        self.response: HttpResponse | None = None
        self.task: asyncio.Task[HttpResponse] | None = None

    def done(self, response: HttpResponse | None, error: BaseException | None) -> None:
        if response is None:
            if not isinstance(error, asyncio.CancelledError):
                log.error("a handler failed", exc_info=error)
            response = HttpResponse(500, JSON, error_body("internal error"))
        self.response = response
        self.connection.answered()


class HttpConnection(asyncio.Protocol):
    """One client. Reading stops while its pipeline is full or its answers go unread."""

    def __init__(self, service: HttpService) -> None:
        self._service = service
        self._limits = service.limits
        self._url: list[bytes] = []
        self._raw: dict[bytes, bytes] = {}
        self._headers: dict[bytes, bytes] = {}
        self._parts: list[bytes] = []
        # httptools calls these as the containers' own methods want to be called: no Python frame per header or piece.
        self.on_url = self._url.append
        self.on_header = self._raw.__setitem__
        self.on_body = self._parts.append
        self._parser = httptools.HttpRequestParser(self)
        self._order: deque[_Slot] = deque()  # started, answered in this order
        self._waiting: deque[_Slot] = deque()  # read, not started
        self._phase = _IDLE
        self._since = service.seconds  # when the phase began
        self._partial = 0  # bytes received of an unfinished head or body
        self._body_begun = False  # the body's announced length was checked
        self._large_read = False  # this read could hold a whole head above the limit
        self._feeding = False
        self._deaf = False  # nothing more is read from this client
        self._lost = False
        self._resuming = False
        self._reading = True
        self._writable = True
        self._blocked_since = 0
        self._sending: asyncio.Task[None] | None = None
        self._unblocked: asyncio.Future[None] | None = None

    # --- called by the transport ---------------------------------------------------------------------------------------

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)
        if self._service.draining or len(self._service.connections) >= self._limits.connections:
            self._service.connections.add(self)
            self._refuse(NotReady("this server has all the connections it accepts"))
            self._flush()
            return
        self._service.connections.add(self)

    def connection_lost(self, exc: Exception | None) -> None:
        self._lost = True
        self._service.forget(self)
        for slot in self._order:
            if slot.task is not None:
                slot.task.cancel()
        if self._sending is not None:
            self._sending.cancel()
        self._order.clear()
        self._waiting.clear()
        # The parser holds methods of this object: without this line every connection would be a cycle.
        del self._parser

    def data_received(self, data: bytes) -> None:
        if self._deaf:
            return
        if self._phase == _IDLE:
            self._phase = _HEAD
            self._since = self._service.seconds
            self._partial = 0
        self._large_read = len(data) > self._limits.header_bytes
        self._feeding = True
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserCallbackError:
            raise
        except httptools.HttpParserUpgrade:
            # No protocol to change to: the request was answered as it is (RFC 9110 7.8), what follows it is not HTTP/1.1.
            self._deaf = True
            self._last_slot_closes()
        except httptools.HttpParserError as error:
            self._refuse(InvalidRequest(f"malformed HTTP: {error}"))
        finally:
            self._feeding = False
        if self._phase != _IDLE and not self._deaf:
            self._check_partial(len(data))
        self._flush()

    def pause_writing(self) -> None:
        self._writable = False
        self._blocked_since = self._service.seconds

    def resume_writing(self) -> None:
        self._writable = True
        if self._unblocked is not None and not self._unblocked.done():
            self._unblocked.set_result(None)
        self._balance()

    # --- called by the parser ------------------------------------------------------------------------------------------

    def on_headers_complete(self) -> None:
        # Copied here, so that trailers of a chunked body never pass for headers (RFC 9110 6.5.1).
        self._headers = {name.lower(): value for name, value in self._raw.items()}
        self._raw.clear()
        self._phase = _BODY
        self._body_begun = False
        if self._large_read:
            self._check_head()

    def on_message_complete(self) -> None:
        self._phase = _IDLE
        if self._deaf:
            return
        parts = self._parts
        body = parts[0] if len(parts) == 1 else b"".join(parts)
        parts.clear()
        self._raw.clear()
        target = self._url[0] if len(self._url) == 1 else b"".join(self._url)
        self._url.clear()
        if len(body) > self._limits.body_bytes:
            self._refuse(self._body_too_large())
            return
        headers = self._headers
        if len(headers) > self._limits.header_count:
            self._refuse(self._head_too_large())
            return
        path, _, query = target.decode("latin-1").partition("?")
        if not path.startswith("/"):
            path = _path_of_absolute(path)
        parser = self._parser
        slot = _Slot(
            self,
            HttpRequest(parser.get_method().decode("latin-1"), path, query, headers, body),
            parser.should_keep_alive(),
        )
        if b"connection" in headers and parser.get_http_version() == "1.0":
            slot.old = True
        if not slot.keep_alive:
            self._deaf = True
        self._admit(slot)

    # --- requests in -----------------------------------------------------------------------------------------------------

    def _admit(self, slot: _Slot) -> None:
        if self._waiting or not self._writable or len(self._order) >= self._limits.pipeline:
            self._waiting.append(slot)
        else:
            self._start(slot)

    def _start(self, slot: _Slot) -> None:
        self._order.append(slot)
        if slot.response is None:
            request = cast(HttpRequest, slot.request)
            service = self._service
            slot.task = drive(service.handler(request), slot.done, service.loop)

    def _check_head(self) -> None:
        size = sum(map(len, self._url)) + sum(len(name) + len(value) for name, value in self._headers.items())
        if size > self._limits.header_bytes:
            self._refuse(self._head_too_large())

    def _check_partial(self, received: int) -> None:
        """A head or body has begun and not ended: hold it to the limits before more of it comes."""
        if self._phase == _HEAD:
            self._partial += received
            if self._partial > self._limits.header_bytes or len(self._raw) > self._limits.header_count:
                self._refuse(self._head_too_large())
            return
        if not self._body_begun:
            self._begin_body()
            return
        self._partial += received
        if self._partial > self._limits.body_bytes + self._limits.header_bytes:
            self._refuse(self._body_too_large())

    def _begin_body(self) -> None:
        self._body_begun = True
        self._partial = 0
        self._since = self._service.seconds
        # llhttp has checked that it is a number that fits 64 bits.
        if int(self._headers.get(b"content-length", b"0")) > self._limits.body_bytes:
            self._refuse(self._body_too_large())
        elif self._headers.get(b"expect", b"").lower() == b"100-continue" and not (self._order or self._waiting):
            self._transport.write(_CONTINUE)

    def _head_too_large(self) -> TooLarge:
        limits = self._limits
        return TooLarge(f"request line and headers exceed {limits.header_bytes} bytes or {limits.header_count} headers")

    def _body_too_large(self) -> TooLarge:
        return TooLarge(f"the body exceeds {self._limits.body_bytes} bytes")

    def _refuse(self, error: TierlineError, status: int | None = None) -> None:
        """Answer with `error` after the requests before it, then close."""
        self._deaf = True
        slot = _Slot(self, None, keep_alive=False)
        slot.response = error_response(error)
        if status is not None:
            slot.response.status = status
        slot.linger = True
        self._admit(slot)

    def _last_slot_closes(self) -> None:
        if self._waiting or self._order:
            (self._waiting or self._order)[-1].keep_alive = False

    # --- answers out -----------------------------------------------------------------------------------------------------

    def answered(self) -> None:
        """A slot of this connection has got its response."""
        if not self._feeding:
            self._flush()

    def _flush(self) -> None:
        """Send the answers that are ready and whose turn it is, in one write."""
        order = self._order
        if self._sending is not None or self._lost:
            return
        out: list[bytes] = []
        size = 0
        while order:
            slot = order[0]
            response = slot.response
            if response is None:
                break
            order.popleft()
            closing = self._closes_after(slot)
            body = response.body
            if isinstance(body, FileBody):
                self._write(out, size)
                self._sending = self._service.loop.create_task(self._send_file(slot, response, body, closing))
                return
            size += self._encode(slot, response, body, closing, out)
            if closing:
                self._write(out, size)
                self._close(slot.linger)
                return
        self._write(out, size)
        if self._waiting or not self._reading or not self._writable or len(order) >= self._limits.pipeline:
            self._balance()

    def _closes_after(self, slot: _Slot) -> bool:
        return not slot.keep_alive or (self._service.draining and not self._order and not self._waiting)

    def _encode(
        self, slot: _Slot, response: HttpResponse, body: bytes | list[bytes], closing: bool, out: list[bytes]
    ) -> int:
        length = len(body) if isinstance(body, bytes) else sum(map(len, body))
        out.append(self._head(slot, response, length, closing))
        if slot.request is not None and slot.request.method == "HEAD":
            return 0
        if isinstance(body, bytes):
            out.append(body)
        else:
            out += body
        return length

    def _head(self, slot: _Slot, response: HttpResponse, length: int, closing: bool) -> bytes:
        connection = _CLOSE if closing else _KEEP_ALIVE if slot.old else b""
        return b"%b%bcontent-length: %d\r\n%b%b\r\n" % (
            _STATUS_LINES[response.status],
            self._service.date,
            length,
            response.headers,
            connection,
        )

    def _write(self, out: list[bytes], size: int) -> None:
        if not out:
            return
        if size <= JOIN_BYTES:
            self._transport.write(b"".join(out))
        else:
            self._transport.writelines(out)

    async def _send_file(self, slot: _Slot, response: HttpResponse, body: FileBody, closing: bool) -> None:
        loop = self._service.loop
        sent = 0
        try:
            head = self._head(slot, response, body.length, closing)
            length = 0 if slot.request is None or slot.request.method == "HEAD" else body.length
            while sent < length:
                size = min(FILE_PIECE_BYTES, length - sent)
                piece = await loop.run_in_executor(None, partial(_read_piece, body.path, body.offset + sent, size))
                self._transport.write(head + piece if sent == 0 else piece)
                sent += size
                await self._until_writable()
            if length == 0:
                self._transport.write(head)
        except (OSError, EOFError) as error:
            log.warning("a file could not be sent: %s", error)
            if sent == 0:
                slot.response = HttpResponse(500, JSON, error_body("internal error"))
                self._order.appendleft(slot)
            else:
                # The length is promised already: cutting the connection is the only honest end.
                self.abort()
        self._sending = None
        if closing and slot.response is response:
            self._close(linger=False)
        else:
            self._flush()

    async def _until_writable(self) -> None:
        # Bounded by the sweep: a client that does not read is cut off, and this task with it.
        while not self._writable:
            self._unblocked = self._service.loop.create_future()
            await self._unblocked

    def _balance(self) -> None:
        """Start what waits, in the next turn of the loop, and read on only when nothing does."""
        if self._lost or self._transport.is_closing():
            return
        room = self._writable and len(self._order) < self._limits.pipeline
        if room and self._waiting and not self._resuming:
            self._resuming = True
            self._service.loop.call_soon(self._resume)
        wanted = room and not self._waiting
        if wanted != self._reading:
            self._reading = wanted
            if wanted:
                self._transport.resume_reading()
            else:
                self._transport.pause_reading()

    def _resume(self) -> None:
        self._resuming = False
        self._feeding = True
        while self._waiting and self._writable and len(self._order) < self._limits.pipeline:
            self._start(self._waiting.popleft())
        self._feeding = False
        self._flush()

    # --- the end ---------------------------------------------------------------------------------------------------------

    def check_time(self) -> None:
        """Called once a second by the sweep."""
        now = self._service.seconds
        if not self._writable and now - self._blocked_since > self._limits.write_seconds:
            self.abort()
            return
        if self._order or self._waiting or self._sending is not None:
            self._since = now  # it is our turn
            return
        age = now - self._since
        if self._deaf:
            if age > LINGER_SECONDS:
                self.abort()
        elif self._phase == _IDLE:
            if age > self._limits.idle_seconds:
                self._transport.close()
        elif age > (self._limits.header_seconds if self._phase == _HEAD else self._limits.body_seconds):
            self._refuse(InvalidRequest("the request took too long to arrive"), http.HTTPStatus.REQUEST_TIMEOUT)
            self._flush()

    def close_if_idle(self) -> None:
        if self._phase == _IDLE and not (self._order or self._waiting or self._sending):
            self._transport.close()

    def abort(self) -> None:
        self._transport.abort()

    def _close(self, linger: bool) -> None:
        self._deaf = True
        self._order.clear()
        self._waiting.clear()
        if linger and self._transport.can_write_eof():
            self._since = self._service.seconds
            self._transport.write_eof()
        else:
            self._transport.close()


_STATUS_LINES = {status.value: f"HTTP/1.1 {status.value} {status.phrase}\r\n".encode() for status in http.HTTPStatus}


def _path_of_absolute(target: str) -> str:
    """The path of `http://host/path`, which a server must accept (RFC 9112 3.2.2); anything else stays as it is."""
    _, mark, rest = target.partition("://")
    if not mark:
        return target
    _, slash, path = rest.partition("/")
    return slash + path or "/"


def _read_piece(path: Path, offset: int, size: int) -> bytes:
    # Opened for each piece: nothing is held open for a client that reads slowly, or went away.
    with path.open("rb") as file:
        file.seek(offset)
        piece = file.read(size)
    if len(piece) != size:
        raise EOFError(f"{path} ends before byte {offset + size}")
    return piece
