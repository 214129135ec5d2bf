"""A lean keep-alive HTTP/1.1 client: one exchange at a time per connection, every wait bounded by the caller's deadline.

Works on any asyncio loop. Nothing here asks for the current task, so a call may begin outside one (`models.serving.drive`).
"""

from __future__ import annotations

import asyncio
import socket
import struct
from collections import OrderedDict
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import cast

from models.errors import DeadlineExceeded, Overloaded, TierlineError, Unreachable
from models.serving.endpoint import Endpoint
from models.serving.reply import Reply, ReplyParser

MAX_WAITING = 1024
"""Calls that may wait for a free connection; more are refused at once."""
_JOIN_BYTES = 64 * 1024
_RESET = struct.pack("ii", 1, 0)  # SO_LINGER: on, zero seconds


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
        self._parser = ReplyParser(peer)

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

    # --- called by the transport -----------------------------------------------------------------------------------------

    def data_received(self, data: bytes) -> None:
        waiter = self._waiter
        if waiter is None or waiter.done():
            self.close()
            return
        try:
            reply = self._parser.feed(data)
        except Unreachable as error:
            self._fail(error)
            return
        if reply is not None:
            self.usable = self.usable and self._parser.keep_alive
            waiter.set_result(reply)

    def connection_lost(self, exc: Exception | None) -> None:
        self.usable = False
        if self.used and not self._parser.begun:
            self._fail(StaleConnection(f"{self._peer} closed the connection"))
        else:
            self._fail(Unreachable(f"{self._peer} closed the connection before it had answered"))
        self._parser.release()

    def _fail(self, error: TierlineError) -> None:
        self.close()
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_exception(error)


class Pool:
    """Kept connections to one server, at most `size` at once; who finds none free waits until the deadline."""

    def __init__(self, endpoint: Endpoint, *, size: int, connect_timeout: float) -> None:
        self._endpoint = endpoint
        self._peer = endpoint.peer
        self._connect_timeout = connect_timeout
        self._free = size
        self._idle: list[Connection] = []
        self._waiting: OrderedDict[asyncio.Future[None], None] = OrderedDict()  # the longest first
        self._open = set[Connection]()
        self._closed = False

    async def exchange(self, parts: list[bytes], deadline: float, *, fresh: bool = False) -> Reply:
        """One request, one answer. Raises DeadlineExceeded, Overloaded or Unreachable.

        `fresh`: on a connection of its own, for a request that must not be sent twice: a kept one may turn out to be closed.
        """
        async with self._permit(deadline):
            if fresh:
                return await self._on(await self._connect(deadline), parts, deadline)
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
        opening = loop.create_task(self._open_one(loop))
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

    async def _open_one(self, loop: asyncio.AbstractEventLoop) -> tuple[asyncio.BaseTransport, Connection]:
        at = self._endpoint
        if at.path is not None:
            return await loop.create_unix_connection(lambda: Connection(self._peer), at.path)
        return await loop.create_connection(lambda: Connection(self._peer), at.host, at.port, ssl=at.tls)

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
        self._waiting[turn] = None
        timer = loop.call_at(deadline, _expire, turn, self._peer)
        try:
            await turn
        except BaseException:
            if turn.done() and not turn.cancelled() and turn.exception() is None:
                self._give_back()  # cancelled in the very turn in which the permit came
            raise
        finally:
            timer.cancel()
            self._waiting.pop(turn, None)

    def _give_back(self) -> None:
        while self._waiting:
            turn, _ = self._waiting.popitem(last=False)
            if not turn.done():
                turn.set_result(None)
                return
        self._free += 1


def _expire(waiter: asyncio.Future[Reply] | asyncio.Future[None], peer: str) -> None:
    if not waiter.done():
        waiter.set_exception(_late(peer))


def _abandon(opening: asyncio.Task[tuple[asyncio.BaseTransport, Connection]]) -> None:
    """Give up an attempt to connect; should it succeed all the same, close what it opened."""
    opening.cancel()
    opening.add_done_callback(_close_opened)


def _close_opened(opening: asyncio.Task[tuple[asyncio.BaseTransport, Connection]]) -> None:
    if not opening.cancelled() and opening.exception() is None:
        opening.result()[1].close()


def _late(peer: str) -> DeadlineExceeded:
    return DeadlineExceeded(f"{peer} did not answer within the deadline")
