"""One HTTP/1.1 client on httptools: requests in, answers out in their order, within the server's limits.

Sources: RFC 9112 (messages), RFC 9110 (semantics).
"""

from __future__ import annotations

import asyncio
import http
import logging
from collections import deque
from typing import TYPE_CHECKING, cast

from models.errors import InvalidRequest, NotReady, TierlineError
from models.serving.drive import drive
from models.serving.exchange import (
    JSON,
    FileBody,
    HttpRequest,
    HttpResponse,
    Upgrade,
    error_body,
    error_response,
)
from models.serving.http.file import read_pieces
from models.serving.http.peer import peer_of
from models.serving.http.reader import BODY, HEAD, IDLE, REST, RequestReader
from models.serving.http.slot import Slot, answer_head, encode_answer, upgrade_head

if TYPE_CHECKING:
    from models.serving.http.service import HttpService

log = logging.getLogger("tierline.http")

LINGER_SECONDS = 2
"""How long a refused client may go on sending before it is cut off: closing at once would destroy the refusal on its way."""
JOIN_BYTES = 64 * 1024
"""Answers up to this size are joined into one write; copying larger ones costs more than handing them over in parts."""
MIN_READ_BYTES = 4096
"""A client that takes at least this much in a second goes on reading; below it, it counts as one that does not."""

_CONTINUE = b"HTTP/1.1 100 Continue\r\n\r\n"


class HttpConnection(RequestReader, asyncio.Protocol):
    """One client. Reading stops while its pipeline is full or its answers go unread."""

    def __init__(self, service: HttpService) -> None:
        super().__init__(service)
        self._upgrading = False
        self._held: list[bytes] = []  # came after a request to upgrade
        self._held_bytes = 0
        self._order: deque[Slot] = deque()  # started, answered in this order
        self._waiting: deque[Slot] = deque()  # read, not started
        self._ended = False  # the client sends no more
        self._lost = False
        self._resuming = False
        self._reading = True
        self._writable = True
        self._blocked_since = 0
        self._unread = 0  # bytes written that the client had not taken at the last sweep
        self._sending: asyncio.Task[None] | None = None
        self._unblocked: asyncio.Future[None] | None = None
        self._out: list[bytes] = []  # to be sent at the end of this turn
        self._out_size = 0

    # --- called by the transport ---------------------------------------------------------------------------------------

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)
        self._peer = peer_of(transport)
        open_now = len(self._service.connections)
        full = open_now >= self._limits.connections
        self._service.connections.add(self)
        if open_now >= 2 * self._limits.connections:
            # Those that are told why hold a place too, for a while.
            self._transport.abort()
            return
        if full or self._service.draining:
            self._refuse(NotReady("this server has all the connections it accepts"))
            self._flush()

    def connection_lost(self, exc: Exception | None) -> None:
        self._lost = True
        self._service.forget(self)
        for slot in self._order:
            if slot.task is not None:
                slot.task.cancel()
        if self._sending is not None:
            self._sending.cancel()
        for slot in (*self._order, *self._waiting):
            slot.let_go()
        self._budget.arrived()
        self._order.clear()
        self._waiting.clear()
        # The parser holds methods of this object: without this line every connection would be a cycle.
        del self._parser

    def data_received(self, data: bytes) -> None:
        if self._deaf:
            if self._upgrading:
                self._hold(data)
            return
        idle = self._phase == IDLE
        if idle:
            known = self._known.match(data)
            if known is not None:
                self._repeat(known)
                return
            begun = self._known.begins(data)
            if begun is not None:
                self._begin_rest(*begun)
                self._flush()
                return
        elif self._phase == REST:
            behind = self._take_rest(data)
            self._flush()
            if behind:
                self.data_received(behind)
            return
        self._parse(data)
        self._learn(data, idle)
        if self._phase != IDLE and not self._deaf:
            self._check_partial(len(data))
        self._completed = None
        self._flush()

    def _repeat(self, request: HttpRequest) -> None:
        """A request whose head is that of the last one: the parser would say the same."""
        self._since = self._service.seconds
        slot = Slot(self, request, keep_alive=True)
        self._feeding = True
        self._admit_whole(slot, len(request.body))
        self._feeding = False
        if slot.response is not None or len(self._order) > 1:
            self._flush()

    def eof_received(self) -> bool:
        """The client sends no more; it is still read from its side, so it gets what it has asked for (RFC 9112 9.6)."""
        self._deaf = self._ended = True
        self._since = self._service.seconds
        self._parts.clear()
        self.send()
        return bool(self._order or self._waiting or self._sending is not None)

    def pause_writing(self) -> None:
        self._writable = False
        self._blocked_since = self._service.seconds
        self._unread = self._transport.get_write_buffer_size()

    def resume_writing(self) -> None:
        self._writable = True
        if self._unblocked is not None and not self._unblocked.done():
            self._unblocked.set_result(None)
        self._balance()

    # --- requests in -----------------------------------------------------------------------------------------------------

    def _admit(self, slot: Slot) -> None:
        if self._waiting or not self._writable or len(self._order) >= self._limits.pipeline:
            self._waiting.append(slot)
        else:
            self._start(slot)

    def _start(self, slot: Slot) -> None:
        self._order.append(slot)
        if slot.response is None:
            request = cast(HttpRequest, slot.request)
            service = self._service
            slot.task = drive(service.handler(request), slot.done, service.loop)

    def _refuse(self, error: TierlineError, status: int | None = None) -> None:
        """Answer with `error` after the requests before it, then close."""
        self._deaf = True
        self._budget.arrived()
        self._parts.clear()
        slot = Slot(self, None, keep_alive=False)
        slot.response = error_response(error)
        if status is not None:
            slot.response.status = status
        slot.linger = True
        self._admit(slot)

    # --- answers out -----------------------------------------------------------------------------------------------------

    def answered(self) -> None:
        """A slot of this connection has got its response."""
        if not self._feeding:
            self._flush()

    def _flush(self) -> None:
        """Write the answers that are ready and whose turn it is."""
        if self._lost:
            return
        order = self._order
        due = self._sending is None and (not order or order[0].response is not None or self._continue_due)
        if due and not self._write_ready():
            return
        if self._waiting or not self._reading or not self._writable or len(order) >= self._limits.pipeline:
            self._balance()

    def _write_ready(self) -> bool:
        """False = the connection went to a file, to another protocol or to its end."""
        order = self._order
        out: list[bytes] = []
        size = 0
        while order:
            slot = order[0]
            response = slot.response
            if response is None:
                break
            order.popleft()
            closing = not slot.keep_alive or self._closes_after(slot)
            body = response.body
            if not isinstance(body, (bytes, list)):
                self._write(out, size)
                if isinstance(body, Upgrade):
                    self._upgrade(response, body)
                else:
                    self.send()
                    self._sending = self._service.loop.create_task(self._send_file(slot, response, body, closing))
                return False
            size += encode_answer(self._service.date, slot, response, body, closing, out)
            if closing:
                self._write(out, size)
                self._close(slot.linger)
                return False
        if self._continue_due and not order and not self._waiting:
            self._continue_due = False
            if self._phase == BODY and not self._deaf:
                out.append(_CONTINUE)
        self._write(out, size)
        return True

    def _upgrade(self, response: HttpResponse, upgrade: Upgrade) -> None:
        """Hand the connection over, after the answers before this one."""
        self.send()
        self._transport.write(upgrade_head(self._service.date, response))
        self._lost = True  # to this protocol
        self._service.forget(self)
        protocol = upgrade.start()
        self._service.adopt(protocol, self._transport)
        del self._parser
        if not self._reading:
            self._transport.resume_reading()
        if self._held and not self._transport.is_closing():
            protocol.data_received(b"".join(self._held))

    def _stop_reading(self, rest: bytes) -> None:
        self._upgrading = True
        self._hold(rest)

    def _hold(self, data: bytes) -> None:
        """What a client sends before its upgrade is answered."""
        if not data:
            return
        self._held.append(data)
        self._held_bytes += len(data)
        if self._held_bytes > self._limits.header_bytes and self._reading:
            self._reading = False
            self._transport.pause_reading()

    def _closes_after(self, slot: Slot) -> bool:
        last = not self._order and not self._waiting
        return not slot.keep_alive or (last and (self._deaf or self._service.draining))

    def _write(self, out: list[bytes], size: int) -> None:
        if not out:
            return
        if self._out:
            self._out += out
            self._out_size += size
        else:
            self._out = out
            self._out_size = size
            self._service.send_soon(self)

    def send(self) -> None:
        """Hand the answers written so far to the transport."""
        out, self._out = self._out, []
        if not out or self._lost:
            return
        if self._out_size <= JOIN_BYTES:
            self._transport.write(b"".join(out))
        else:
            self._transport.writelines(out)

    async def _send_file(self, slot: Slot, response: HttpResponse, body: FileBody, closing: bool) -> None:
        head = answer_head(self._service.date, slot, response, body.length, closing)
        wanted = not (slot.request is not None and slot.request.method == "HEAD")
        begun = False
        try:
            async for piece in read_pieces(body if wanted else FileBody(body.path, 0, 0)):
                self._transport.write(piece if begun else head + piece)
                begun = True
                await self._until_writable()
            if not begun:
                self._transport.write(head)
        except (OSError, EOFError) as error:
            log.warning("a file could not be sent: %s", error)
            if begun:
                # The length is promised already: cutting the connection is the only honest end.
                self.abort()
                return
            slot.response = HttpResponse(500, JSON, error_body("internal error"))
            self._order.appendleft(slot)
            closing = False
        self._sending = None
        if closing or self._closes_after(slot):
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
        wanted = room and not self._waiting and not self._ended
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
        if not self._writable:
            left = self._transport.get_write_buffer_size()
            if left <= self._unread - MIN_READ_BYTES:
                self._blocked_since = now
            self._unread = left
            if now - self._blocked_since > self._limits.write_seconds:
                self.abort()
                return
        if self._order or self._waiting or self._sending is not None:
            if not self._ended:
                self._since = now  # it is our turn
            elif now - self._since > self._limits.idle_seconds:
                self.abort()  # whether it still waits cannot be seen
            return
        age = now - self._since
        if self._deaf:
            if age > LINGER_SECONDS:
                self.abort()
        elif self._phase == IDLE:
            if age > self._limits.idle_seconds:
                self._transport.close()
        elif age > (self._limits.header_seconds if self._phase == HEAD else self._limits.body_seconds):
            self._refuse(InvalidRequest("the request took too long to arrive"), http.HTTPStatus.REQUEST_TIMEOUT)
            self._flush()

    def close_if_idle(self) -> None:
        if self._phase == IDLE and not (self._order or self._waiting or self._sending):
            self.send()
            self._transport.close()

    def abort(self) -> None:
        self._transport.abort()

    def _close(self, linger: bool) -> None:
        self.send()
        self._deaf = True
        self._order.clear()
        self._waiting.clear()
        if linger and not self._ended and self._transport.can_write_eof():
            self._since = self._service.seconds
            self._transport.write_eof()
        else:
            self._transport.close()
