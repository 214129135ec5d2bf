"""HTTP/1.1 for a pure handler, made for many small requests: what the connections of one server share.

Answers leave in the order of their requests, and all of one turn of the loop leave at its end. A request whose answer is
ready at once costs no Task (`models.serving.drive`), and no request costs a timer: one sweep a second looks at every
connection's phase. The connection itself is in `models.serving.http.connection`.
"""

from __future__ import annotations

import asyncio
from email.utils import formatdate
from weakref import WeakSet

import msgspec

from models.serving.exchange import Handler
from models.serving.http.connection import HttpConnection


class HttpLimits(msgspec.Struct, frozen=True):
    """What one server and one connection may take.

    `header_bytes`, `header_count`: request line and headers together. `body_bytes`: of a chunked body the framing counts
    too. `held_bytes`: bodies of all connections together, arriving and in work. `connections`: at once. `pipeline`: requests
    of one connection in work at once, also the most that are started in one turn of the loop. `header_seconds`,
    `body_seconds`: from first to last byte. `idle_seconds`: between requests. `write_seconds`: how long a client may leave an
    answer unread.
    """

    header_bytes: int = 32 * 1024
    header_count: int = 100
    body_bytes: int = 64 * 1024 * 1024
    held_bytes: int = 256 * 1024 * 1024
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
        self.upgraded: WeakSet[asyncio.Transport] = WeakSet()
        self.seconds = 0
        self.held_bytes = 0
        self.draining = False
        self.empty = asyncio.Event()  # set when draining has let the last connection go
        self.date = b""
        self._unsent: list[HttpConnection] = []
        self._set_date()

    def connect(self) -> HttpConnection:
        return HttpConnection(self)

    def adopt(self, protocol: asyncio.Protocol, transport: asyncio.Transport) -> None:
        """A connection has changed its protocol: from here on it belongs to `protocol`, until it closes."""
        transport.set_protocol(protocol)
        self.upgraded.add(transport)
        protocol.connection_made(transport)

    def send_soon(self, connection: HttpConnection) -> None:
        """Let `connection` send at the end of this turn of the loop.

        Sending wakes the client. Woken once for all that this turn answers, instead of once for each answer, clients and
        server stay out of each other's way: measured, 80 -> 47 us of CPU per request at 32 connections on a virtual machine.
        """
        if not self._unsent:
            self.loop.call_soon(self.send_now)
        self._unsent.append(connection)

    def send_now(self) -> None:
        unsent, self._unsent = self._unsent, []
        for connection in unsent:
            connection.send()

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
        for transport in tuple(self.upgraded):
            transport.abort()

    def _set_date(self) -> None:
        self.date = b"date: %b\r\n" % formatdate(usegmt=True).encode()
