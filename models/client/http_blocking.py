"""Calls over HTTP on plain blocking sockets, from any number of threads."""

from __future__ import annotations

import os
import select
import socket
import ssl
import struct
import threading
import time
from typing import Any, TypeVar, cast
from weakref import WeakSet

from models.client.calls import Call
from models.client.http_calls import HttpCall, milliseconds_of
from models.errors import DeadlineExceeded, Unreachable
from models.serving.endpoint import Endpoint
from models.serving.reply import Reply, ReplyParser

T = TypeVar("T")

JOIN_BYTES = 64 * 1024
"""Requests up to this size are joined into one write; copying larger ones costs more than sending them in parts."""
READ_BYTES = 64 * 1024
_RESET = struct.pack("ii", 1, 0)  # SO_LINGER: on, zero seconds


class StaleConnection(Unreachable):
    """A kept connection was closed by the server before any byte of the answer: the request may be sent again."""


class BlockingConnection:
    """One connection, one exchange at a time. It is `usable` until anything goes wrong, and never again after."""

    def __init__(self, sock: socket.socket, peer: str) -> None:
        self.usable = True
        self._sock = sock
        self._peer = peer
        self._used = False
        self._milliseconds = -1  # how long the socket waits now
        self._parser = ReplyParser(peer)
        # The head of the last answer that came whole in one read, and the length of all of it.
        self._known = b""
        self._known_read = -1
        self._known_headers: dict[bytes, bytes] = {}
        self._poll = select.poll()
        self._poll.register(sock, select.POLLIN)

    def is_quiet(self) -> bool:
        """Whether it may carry another request: bytes that nobody asked for, or the end, spoil it."""
        return not self._poll.poll(0)

    def exchange(self, call: HttpCall[Any], deadline: float) -> Reply:
        """Send a request and wait for its answer. After an error the connection is closed.

        Raises DeadlineExceeded, StaleConnection or Unreachable.
        """
        try:
            self._send(call, deadline)
            reply = self._receive(deadline)
        except OSError as error:
            self.reset()
            # One with a number comes from the network, which has given up the connection.
            if isinstance(error, TimeoutError) and error.errno is None:
                raise late(self._peer) from error
            if self._used and not self._parser.begun:
                raise StaleConnection(f"{self._peer} closed the connection") from error
            raise Unreachable(f"{self._peer}: {error}") from error
        except BaseException:
            self.reset()
            raise
        self._used = True
        return reply

    def reset(self) -> None:
        """Give up the connection, and the answer that may be under way.

        Reset, not ended: a server owes one that only ended its side the answer, and would work on.
        """
        if self.usable:
            try:
                self._sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET)
            except OSError:
                pass  # it is gone already
        self.close()

    def close(self) -> None:
        self.usable = False
        if self._sock.fileno() >= 0:
            self._sock.close()
            self._parser.release()

    def _send(self, call: HttpCall[Any], deadline: float) -> None:
        milliseconds = self._limit(deadline)
        parts = call.parts(milliseconds)
        if len(call.body) and sum(map(len, parts)) > JOIN_BYTES:
            for part in parts:
                self._send_part(part, deadline)
        else:
            self._send_part(b"".join(parts), deadline)

    def _send_part(self, data: bytes, deadline: float) -> None:
        sent = self._sock.send(data)
        if sent < len(data):
            view = memoryview(data)
            while sent < len(data):
                self._limit(deadline)
                sent += self._sock.send(view[sent:])
            self._limit(deadline)

    def _receive(self, deadline: float) -> Reply:
        data = self._sock.recv(READ_BYTES)
        if len(data) == self._known_read and data.startswith(self._known):
            # The same head again, to the byte, and its body: the parser would say the same.
            return Reply(200, self._known_headers, data[len(self._known) :])
        first = data
        while True:
            if not data:
                raise ConnectionResetError("the server closed the connection before it had answered")
            reply = self._parser.feed(data)
            if reply is not None:
                break
            self._limit(deadline)
            data = self._sock.recv(READ_BYTES)
        if not self._parser.keep_alive:
            self.close()
        elif data is first:
            self._learn(data, reply)
        return reply

    def _learn(self, data: bytes, reply: Reply) -> None:
        """`data` was one whole answer: the next one may have the same head. A chunked body has no length in it."""
        size = len(reply.body)
        if (
            reply.status == 200
            and size > 0
            and b"transfer-encoding" not in reply.headers
            and reply.headers.get(b"content-length") == b"%d" % size
            and data.endswith(reply.body)
            and data.find(b"\r\n\r\n") == len(data) - size - 4
        ):
            self._known = data[:-size]
            self._known_read = len(data)
            self._known_headers = reply.headers

    def _limit(self, deadline: float) -> int:
        """Let the socket wait until `deadline` at the longest. Returns the milliseconds left, raises TimeoutError for none."""
        milliseconds = milliseconds_of(deadline - time.monotonic())
        if milliseconds <= 0:
            raise TimeoutError
        # Setting it is a call to the system: a program gives all its requests the same time.
        if milliseconds != self._milliseconds:
            self._sock.settimeout(milliseconds / 1e3)
            self._milliseconds = milliseconds
        return milliseconds


class BlockingHttp:
    """`Transport` with at most `size` connections; who finds none free waits until the deadline."""

    def __init__(self, endpoint: Endpoint, *, size: int, connect_timeout: float) -> None:
        self._endpoint = endpoint
        self._peer = endpoint.peer
        self._size = size
        self._connect_timeout = connect_timeout
        self._forget()
        _POOLS.add(self)

    def run(self, call: Call[T], deadline: float) -> T:
        http = cast(HttpCall[T], call)
        return http.read(self._exchange(http, deadline))

    def close(self) -> None:
        """Close the connections that are free now, and the others after their call."""
        with self._changed:
            self._closed = True
            while self._idle:
                self._idle.pop().close()
            self._changed.notify_all()

    def _exchange(self, call: HttpCall[Any], deadline: float) -> Reply:
        self._take(deadline)
        try:
            connection = self._kept() if call.repeatable else None
            if connection is None:
                return self._on(self._connect(deadline), call, deadline)
            try:
                return self._on(connection, call, deadline)
            except StaleConnection:
                # Once only, and on a connection that cannot be stale.
                return self._on(self._connect(deadline), call, deadline)
        finally:
            self._give_back()

    def _on(self, connection: BlockingConnection, call: HttpCall[Any], deadline: float) -> Reply:
        reply = connection.exchange(call, deadline)
        if connection.usable:
            # More than `size`: those of calls that had to have one of their own.
            if self._closed or len(self._idle) >= self._size:
                connection.close()
            else:
                self._idle.append(connection)
        return reply

    def _kept(self) -> BlockingConnection | None:
        while self._idle:
            try:
                # The one used last: those that are not needed grow idle and are closed by the server.
                connection = self._idle.pop()
            except IndexError:  # another thread was quicker
                return None
            if connection.is_quiet():
                return connection
            connection.close()
        return None

    def _connect(self, deadline: float) -> BlockingConnection:
        if self._closed:
            raise Unreachable(f"the client of {self._peer} is closed")
        limit = min(deadline, time.monotonic() + self._connect_timeout)
        try:
            sock = _open(self._endpoint, limit)
        except TimeoutError as error:
            if limit == deadline:
                raise late(self._peer) from error
            raise Unreachable(f"{self._peer} did not accept a connection within {self._connect_timeout:g} s") from error
        except OSError as error:
            raise Unreachable(f"{self._peer}: {error}") from error
        return BlockingConnection(sock, self._peer)

    def _take(self, deadline: float) -> None:
        with self._changed:
            while self._free == 0:
                if not self._changed.wait(deadline - time.monotonic()):
                    raise late(self._peer)
            self._free -= 1

    def _give_back(self) -> None:
        with self._changed:
            self._free += 1
            self._changed.notify()

    def _forget(self) -> None:
        """Begin without connections: a forked child must not speak on its parent's, nor wait for its parent's threads."""
        self._changed = threading.Condition()
        self._free = self._size
        self._idle: list[BlockingConnection] = []
        self._closed = False


_POOLS: WeakSet[BlockingHttp] = WeakSet()


def late(peer: str) -> DeadlineExceeded:
    return DeadlineExceeded(f"{peer} did not answer within the deadline")


def _open(endpoint: Endpoint, limit: float) -> socket.socket:
    """A connected socket. Raises OSError; TimeoutError when `limit` has passed."""
    if endpoint.path is not None:
        return _connected(socket.socket(socket.AF_UNIX), endpoint.path, limit)
    error: OSError | None = None
    for family, kind, proto, _, address in socket.getaddrinfo(endpoint.host, endpoint.port, type=socket.SOCK_STREAM):
        try:
            sock = _connected(socket.socket(family, kind, proto), address, limit)
        except OSError as failed:
            error = error or failed
            continue
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        return sock if endpoint.tls is None else _encrypted(sock, endpoint.tls, endpoint.host, limit)
    raise error or OSError("the name has no address")


def _connected(sock: socket.socket, address: Any, limit: float) -> socket.socket:
    try:
        # Not 0, which would mean not to wait at all but to fail as one that would block.
        sock.settimeout(max(limit - time.monotonic(), 1e-3))
        sock.connect(address)
    except BaseException:
        sock.close()
        raise
    return sock


def _encrypted(sock: socket.socket, context: ssl.SSLContext, host: str, limit: float) -> socket.socket:
    try:
        sock.settimeout(max(limit - time.monotonic(), 1e-3))
        return context.wrap_socket(sock, server_hostname=host)
    except BaseException:
        sock.close()
        raise


def _forget_all() -> None:
    for pool in tuple(_POOLS):
        pool._forget()


os.register_at_fork(after_in_child=_forget_all)
