"""A lean keep-alive HTTP/1.1 client: one exchange at a time per connection, every wait bounded by the caller's deadline.

Works on any asyncio loop. Nothing here asks for the current task, so a call may begin outside one (`models.serving.drive`).
"""

from __future__ import annotations

import asyncio
import socket
import struct
from collections import deque
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import cast

import httptools
import msgspec

from models.errors import DeadlineExceeded, Overloaded, TierlineError, Unreachable

MAX_RESPONSE_BYTES = 64 * 1024 * 1024
"""Largest answer that is read, as large as the largest request our own server takes by default."""
MAX_RESPONSE_HEAD_BYTES = 32 * 1024
MAX_RESPONSE_HEADERS = 100
MAX_WAITING = 1024
"""Calls that may wait for a free connection; more are refused at once."""
_JOIN_BYTES = 64 * 1024
_RESET = struct.pack("ii", 1, 0)  # SO_LINGER: on, zero seconds


class Reply(msgspec.Struct):
    """A complete answer. `headers`: names in lower case."""

    status: int
    headers: dict[bytes, bytes]
    body: bytes


class StaleConnection(Unreachable):
    """A kept connection was closed by the server before any byte of the answer: the request may be sent again."""


class Connection(asyncio.Protocol):
    """One connection. It is `usable` until anything goes wrong, and never again after."""

    def __init__(self, peer: str) -> None:
        self._peer = peer
        self.usable = True
        self.used = False
        self._transport: asyncio.Transport | None = None
        self._waiter: asyncio.Future[Reply] | None = None
        self._raw: dict[bytes, bytes] = {}
        self._body: list[bytes] = []
        self._received = 0  # bytes of the answer under way
        self._in_body = False
        # httptools calls these as the containers' own methods want to be called.
        self.on_header = self._raw.__setitem__
        self.on_body = self._body.append
        self._parser = httptools.HttpResponseParser(self)

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)

    async def exchange(self, parts: list[bytes], deadline: float) -> Reply:
        """Send a request and wait for its answer until `deadline` (the loop's clock).

        Raises DeadlineExceeded, StaleConnection or Unreachable; after an error, or when cancelled, the connection is closed.
        """
        assert self._transport is not None
        loop = asyncio.get_running_loop()
        self._waiter = waiter = loop.create_future()
        if sum(map(len, parts)) <= _JOIN_BYTES:
            self._transport.write(b"".join(parts))
        else:
            self._transport.writelines(parts)
        timer = loop.call_at(deadline, _expire, waiter, self._peer)
        try:
            reply: Reply = await waiter
        except BaseException:
            # The answer may still arrive: nobody must take it for the answer to the next request. Reset, not ended: a server
            # owes one that only ended its side the answer, and would work on.
            if self.usable:
                self._transport.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET)
            self.close()
            raise
        finally:
            timer.cancel()
            self._waiter = None
        self.used = True
        return reply

    def close(self) -> None:
        self.usable = False
        if self._transport is not None:
            self._transport.abort()

    # --- called by the transport and the parser --------------------------------------------------------------------------

    def data_received(self, data: bytes) -> None:
        if self._waiter is None:
            self.close()
            return
        self._received += len(data)
        try:
            self._parser.feed_data(data)
        except (httptools.HttpParserError, httptools.HttpParserUpgrade) as error:
            self._fail(Unreachable(f"{self._peer} did not answer in HTTP: {error}"))
            return
        limit = MAX_RESPONSE_BYTES if self._in_body else MAX_RESPONSE_HEAD_BYTES + len(data)
        if self._received > limit or len(self._raw) > MAX_RESPONSE_HEADERS:
            self._fail(Unreachable(f"{self._peer} sent an answer above {limit} bytes"))

    def connection_lost(self, exc: Exception | None) -> None:
        self.usable = False
        if self.used and not self._received:
            self._fail(StaleConnection(f"{self._peer} closed the connection"))
        else:
            self._fail(Unreachable(f"{self._peer} closed the connection before it had answered"))
        # The parser holds methods of this object: without this line every connection would be a cycle.
        del self._parser

    def on_headers_complete(self) -> None:
        self._in_body = True

    def on_message_complete(self) -> None:
        status = self._parser.get_status_code()
        if status < 200:
            self._reset()
            return
        if not self._parser.should_keep_alive():
            self.usable = False
        reply = Reply(status, {name.lower(): value for name, value in self._raw.items()}, b"".join(self._body))
        waiter = self._waiter
        self._reset()
        if waiter is None or waiter.done():
            self.close()  # more answers than requests: nothing on this connection can be trusted
        else:
            waiter.set_result(reply)

    def _reset(self) -> None:
        self._raw.clear()
        self._body.clear()
        self._received = 0
        self._in_body = False

    def _fail(self, error: TierlineError) -> None:
        self.close()
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_exception(error)


class Pool:
    """Kept connections to one server, at most `size` at once; who finds none free waits until the deadline."""

    def __init__(self, host: str, port: int, *, size: int, connect_timeout: float) -> None:
        self._host = host
        self._port = port
        self._peer = f"{host}:{port}"
        self._connect_timeout = connect_timeout
        self._free = size
        self._idle: list[Connection] = []
        self._waiting: deque[asyncio.Future[None]] = deque()
        self._open = set[Connection]()
        self._closed = False

    async def exchange(self, parts: list[bytes], deadline: float) -> Reply:
        """One request, one answer. Raises DeadlineExceeded, Overloaded or Unreachable."""
        async with self._permit(deadline):
            return await self.exchange_unbounded(parts, deadline)

    async def exchange_unbounded(self, parts: list[bytes], deadline: float) -> Reply:
        """As `exchange`, but without waiting for others: for a ping, which must not take a full pool for a dead server."""
        connection = self._kept() or await self._connect(deadline)
        try:
            return await self._on(connection, parts, deadline)
        except StaleConnection:
            # Once only, and on a connection that cannot be stale.
            return await self._on(await self._connect(deadline), parts, deadline)

    def close(self) -> None:
        self._closed = True
        for connection in tuple(self._open):
            connection.close()
        self._open.clear()
        self._idle.clear()

    async def _on(self, connection: Connection, parts: list[bytes], deadline: float) -> Reply:
        try:
            reply = await connection.exchange(parts, deadline)
        finally:
            if connection.usable:
                self._idle.append(connection)
            else:
                connection.close()
                self._open.discard(connection)
        return reply

    def _kept(self) -> Connection | None:
        while self._idle:
            # The one used last: those that are not needed grow idle and are closed by the server.
            connection = self._idle.pop()
            if connection.usable:
                return connection
            self._open.discard(connection)
        return None

    async def _connect(self, deadline: float) -> Connection:
        if self._closed:
            raise Unreachable(f"the client of {self._peer} is closed")
        loop = asyncio.get_running_loop()
        budget = min(self._connect_timeout, deadline - loop.time())
        opening = loop.create_task(loop.create_connection(lambda: Connection(self._peer), self._host, self._port))
        try:
            await asyncio.wait((opening,), timeout=max(budget, 0.0))
        except asyncio.CancelledError:
            _abandon(opening)
            raise
        if not opening.done() or opening.cancelled():
            _abandon(opening)
            if loop.time() >= deadline:
                raise _late(self._peer)
            raise Unreachable(f"{self._peer} did not accept a connection within {self._connect_timeout:g} s")
        error = opening.exception()
        if error is not None:
            raise Unreachable(f"{self._peer}: {error}") from error
        connection = opening.result()[1]
        self._open.add(connection)
        return connection

    @asynccontextmanager
    async def _permit(self, deadline: float) -> AsyncIterator[None]:
        if self._free:
            self._free -= 1
        else:
            await self._wait_for_permit(deadline)
        try:
            yield
        finally:
            self._give_back()

    async def _wait_for_permit(self, deadline: float) -> None:
        if len(self._waiting) >= MAX_WAITING:
            raise Overloaded(f"{MAX_WAITING} calls to {self._peer} wait for a connection already")
        loop = asyncio.get_running_loop()
        turn: asyncio.Future[None] = loop.create_future()
        self._waiting.append(turn)
        timer = loop.call_at(deadline, _expire, turn, self._peer)
        try:
            await turn
        except BaseException:
            if turn.done() and not turn.cancelled() and turn.exception() is None:
                self._give_back()  # cancelled in the very turn in which the permit came
            raise
        finally:
            timer.cancel()

    def _give_back(self) -> None:
        while self._waiting:
            turn = self._waiting.popleft()
            if not turn.done():
                turn.set_result(None)
                return
        self._free += 1


def _expire(waiter: asyncio.Future[Reply] | asyncio.Future[None], peer: str) -> None:
    if not waiter.done():
        waiter.set_exception(_late(peer))


def _abandon(opening: asyncio.Task[tuple[asyncio.Transport, Connection]]) -> None:
    """Give up an attempt to connect; should it succeed all the same, close what it opened."""
    opening.cancel()
    opening.add_done_callback(_close_opened)


def _close_opened(opening: asyncio.Task[tuple[asyncio.Transport, Connection]]) -> None:
    if not opening.cancelled() and opening.exception() is None:
        opening.result()[1].close()


def _late(peer: str) -> DeadlineExceeded:
    return DeadlineExceeded(f"{peer} did not answer within the deadline")
