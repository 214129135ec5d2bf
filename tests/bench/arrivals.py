"""An open loop: requests leave when their time has come, whether or not earlier ones were answered.

Arrivals are a seeded Poisson process. A latency counts from the moment the request was due, so that waiting for a slow server
is part of it (a closed loop hides that). The loop spins on its sockets near a due time: the kernel's timers are too coarse.
Where others need its core it sleeps instead, and goes before them where it may.
"""

from __future__ import annotations

import gc
import os
import re
import select
import socket
import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

import numpy as np
from measure import Load, Times, quantiles

MAX_CONNECTIONS = 512
"""Requests in flight at most; later ones wait here, which counts."""
SPIN_SECONDS = 0.002
DRAIN_SECONDS = 10.0
SEND_SECONDS = 5.0
BUFFER_BYTES = 1 << 20

_LENGTH = re.compile(rb"\r\ncontent-length: *(\d+)", re.IGNORECASE)
_RETRY = re.compile(rb"\r\nretry-after: *\d", re.IGNORECASE)


class Reply(NamedTuple):
    """One answer. `latency`: seconds since it was due. `round_trip`: seconds since it was sent. `due`: since the start."""

    status: int
    latency: float
    round_trip: float
    due: float
    retry_after: bool


class Outcome(NamedTuple):
    """`late`: how late requests were sent, p99 in seconds. `seconds`: from the start to the last due time."""

    replies: list[Reply]
    asked: int
    late: float
    seconds: float

    def good(self) -> list[Reply]:
        return [reply for reply in self.replies if reply.status == 200]

    def times(self) -> Times:
        """Of good answers, microseconds."""
        return quantiles([reply.latency * 1e6 for reply in self.good()])


class _Connection:
    __slots__ = ("due", "received", "sent", "socket")

    def __init__(self, address: tuple[str, int]) -> None:
        self.socket = socket.create_connection(address, SEND_SECONDS)
        self.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, BUFFER_BYTES)
        self.received = bytearray()
        self.due = self.sent = 0.0


class _Generator:
    def __init__(self, load: Load, *, spins: bool) -> None:
        self._spins = spins
        host = load.url.removeprefix("http://").partition("/")[0]
        name, _, port = host.partition(":")
        lines = [f"POST {load.url.removeprefix('http://' + host)} HTTP/1.1", f"host: {host}"]
        lines += [*load.headers, f"content-length: {len(load.body)}"]
        self._request = "\r\n".join(lines).encode() + b"\r\n\r\n" + load.body
        self._address = (name, int(port))
        self._poll = select.epoll()
        self._free: list[_Connection] = []
        self._busy: dict[int, _Connection] = {}
        self._waiting: deque[float] = deque()
        self._late: list[float] = []
        self._replies: list[Reply] = []
        self._begun = 0.0

    def run(self, rate: float, seconds: float, seed: int) -> Outcome:
        gaps = np.random.default_rng(seed).exponential(1 / rate, int(rate * seconds * 1.2) + 10)
        due = [moment for moment in np.cumsum(gaps).tolist() if moment < seconds]
        self._free = [_Connection(self._address) for _ in range(8)]
        gc.collect()
        gc.disable()
        try:
            self._begun = time.perf_counter()
            self._send_all(due)
            self._drain()
        finally:
            gc.enable()
            for connection in (*self._free, *self._busy.values()):
                connection.socket.close()
            self._poll.close()
        late = sorted(self._late)[len(self._late) * 99 // 100]
        return Outcome(self._replies, len(due), late, seconds)

    def _send_all(self, due: list[float]) -> None:
        for moment in due:
            while (left := self._begun + moment - time.perf_counter()) > 0:
                if self._spins:
                    self._receive(left - SPIN_SECONDS if left > 2 * SPIN_SECONDS else 0.0)
                else:
                    # An epoll waits for whole milliseconds only.
                    select.select([self._poll], [], [], left)
                    self._receive(0.0)
            self._waiting.append(moment)
            self._send_waiting()
            self._receive(0.0)

    def _drain(self) -> None:
        ends = time.perf_counter() + DRAIN_SECONDS
        while (self._busy or self._waiting) and time.perf_counter() < ends:
            self._receive(0.05)

    def _send_waiting(self) -> None:
        while self._waiting and (self._free or len(self._busy) < MAX_CONNECTIONS):
            connection = self._free.pop() if self._free else _Connection(self._address)
            connection.due = self._waiting.popleft()
            connection.sent = time.perf_counter()
            self._late.append(connection.sent - self._begun - connection.due)
            connection.socket.sendall(self._request)
            self._busy[connection.socket.fileno()] = connection
            self._poll.register(connection.socket, select.EPOLLIN)

    def _receive(self, seconds: float) -> None:
        for number, _ in self._poll.poll(seconds):
            connection = self._busy[number]
            data = connection.socket.recv(1 << 16)
            connection.received += data
            if self._ended(connection, closed=not data):
                self._poll.unregister(number)
                del self._busy[number]
                self._send_waiting()

    def _ended(self, connection: _Connection, *, closed: bool) -> bool:
        head, found, body = connection.received.partition(b"\r\n\r\n")
        length = _LENGTH.search(head) if found else None
        if closed:
            self._reply(connection, 0, retry_after=False)
            connection.socket.close()
            return True
        if length is None or len(body) < int(length[1]):
            return False
        self._reply(connection, int(head[9:12]), retry_after=_RETRY.search(head) is not None)
        connection.received = bytearray()
        self._free.append(connection)
        return True

    def _reply(self, connection: _Connection, status: int, *, retry_after: bool) -> None:
        now = time.perf_counter()
        latency = now - self._begun - connection.due
        self._replies.append(Reply(status, latency, now - connection.sent, connection.due, retry_after))


def open_loop(load: Load, *, rate: float, seconds: float, seed: int = 0, alone: bool = True) -> Outcome:
    """Ask at `rate` per second on average. What is unanswered ten seconds after the last request is missing in `replies`.

    `alone`: on its core, which it may keep busy.
    """
    if alone:
        return _Generator(load, spins=True).run(rate, seconds, seed)
    with _first():
        return _Generator(load, spins=False).run(rate, seconds, seed)


@contextmanager
def _first() -> Iterator[None]:
    """Before all others on this core, where this user may: without, answers also wait here for their turn."""
    try:
        os.sched_setscheduler(0, os.SCHED_FIFO, os.sched_param(1))
    except (AttributeError, PermissionError):
        yield
        return
    try:
        yield
    finally:
        os.sched_setscheduler(0, os.SCHED_OTHER, os.sched_param(0))
