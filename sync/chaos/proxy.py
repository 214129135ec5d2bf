"""A TCP proxy that passes everything until a fault is on. asyncio; `sync.chaos.threaded` is the same for plain code."""

from __future__ import annotations

import asyncio
import logging
import socket
import struct
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager, suppress
from random import Random
from types import TracebackType
from typing import Self
from urllib.parse import urlsplit

from sync.chaos.faults import Direction, Fault, Flow, Piece
from sync.chaos.listener import Listener

CHUNK = 64 * 1024
MAX_WAITING = 256
"""Pieces of one direction that may wait: 16 MiB at most, then its sender is held back."""
CONNECT_SECONDS = 10.0
ACCEPT_AGAIN_SECONDS = 0.1
MAX_CONNECTIONS = 4_000
"""At once; each takes two descriptors. Further ones are reset."""

log = logging.getLogger(__name__)

Tell = Callable[[Mapping[str, object]], None]


def host_port(text: str) -> tuple[str, int]:
    """`host:port`, `[v6]:port` or a URL that has both. Raises ValueError."""
    parts = urlsplit(text if "://" in text else f"//{text}")
    if not parts.hostname or parts.port is None:
        raise ValueError(f"{text!r} is not HOST:PORT")
    return parts.hostname, parts.port


class Proxy:
    """`async with Proxy("127.0.0.1:1883") as proxy:` listens on `proxy.address` (loopback, a free port unless told).

    `seed`: of everything random, so that a run can be repeated. `tell`: gets an event when a fault begins and ends. One
    fault at a time.
    """

    def __init__(
        self,
        to: str,
        *,
        listen: str = "127.0.0.1:0",
        seed: int = 0,
        tell: Tell = lambda event: None,
    ) -> None:
        self._to = host_port(to)
        self._listen = host_port(listen)
        self._random = Random(seed)  # noqa: S311 - a run that can be repeated, not a secret
        self._tell = tell
        self._listener: Listener | None = None
        self._accepting: asyncio.Task[None] | None = None
        self._fault: Fault | None = None
        self._began = 0.0
        self._calm = asyncio.Event()
        self._calm.set()
        self._pairs: dict[int, _Pair] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self.accepted = 0

    async def __aenter__(self) -> Self:
        self._listener = Listener(*self._listen)
        self._resume()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._pause()
        if self._listener is not None:
            self._listener.close()
        for pair in list(self._pairs.values()):
            pair.abort()
        for task in self._tasks:
            task.cancel()
        if self._tasks:
            await asyncio.wait(self._tasks, timeout=1.0)

    @property
    def address(self) -> tuple[str, int]:
        """Host and port to connect to."""
        if self._listener is None:
            raise RuntimeError("the proxy is not open")
        return self._listener.address

    @property
    def open_connections(self) -> int:
        return len(self._pairs)

    def url(self, scheme: str = "http") -> str:
        host, port = self.address
        return f"{scheme}://[{host}]:{port}" if ":" in host else f"{scheme}://{host}:{port}"

    @asynccontextmanager
    async def suffering(self, fault: Fault) -> AsyncIterator[Fault]:
        """The fault is on inside the block. Raises NeverFired at its end when nothing came the fault's way."""
        await self.begin(fault)
        try:
            yield fault
        finally:
            await self.end()
        fault.insist()

    async def begin(self, fault: Fault) -> None:
        """Raises RuntimeError when a fault is on already."""
        if self._fault is not None:
            raise RuntimeError(f"{self._fault.name} is still on")
        assert self._listener is not None
        self._fault = fault
        self._began = asyncio.get_running_loop().time()
        self._calm.clear()
        self._tell({"event": "fault began", "fault": fault.name, "connections": len(self._pairs)})
        if fault.admission == "unanswered":
            self._pause()
            await self._listener.deafen()
        if fault.resets_open:
            for pair in list(self._pairs.values()):
                fault.tally.touch(pair.number)
                pair.abort()

    async def end(self) -> Fault:
        """Heal. The fault, with its tally."""
        fault, self._fault = self._fault, None
        if fault is None:
            raise RuntimeError("no fault is on")
        assert self._listener is not None
        if fault.admission == "unanswered":
            fault.tally.unanswered += self._listener.hear()
            self._resume()
        for pair in list(self._pairs.values()):
            if pair.spoiled:
                pair.abort()
            pair.notes.clear()
        self._calm.set()
        tally = fault.tally
        self._tell(
            {
                "event": "fault ended",
                "fault": fault.name,
                "seconds": round(asyncio.get_running_loop().time() - self._began, 3),
                "fired": fault.fired,
                "connections": len(tally.connections),
                "bytes": tally.bytes,
                "requests": tally.requests,
                "unanswered": tally.unanswered,
            }
        )
        return fault

    # --- connections --------------------------------------------------------------------------------------------

    def _resume(self) -> None:
        self._accepting = asyncio.create_task(self._accept(), name="chaos accept")

    def _pause(self) -> None:
        if self._accepting is not None:
            self._accepting.cancel()

    async def _accept(self) -> None:
        assert self._listener is not None
        while True:
            try:
                client = await self._listener.accept()
            except OSError as error:
                log.warning("could not accept a connection: %s", error)  # out of descriptors: that passes
                await asyncio.sleep(ACCEPT_AGAIN_SECONDS)
                continue
            self.accepted += 1
            if len(self._pairs) >= MAX_CONNECTIONS:
                _reset(client)
                continue
            task = asyncio.create_task(self._serve(self.accepted, client), name=f"chaos connection {self.accepted}")
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)

    async def _serve(self, number: int, client: socket.socket) -> None:
        fault = self._fault
        admission = "pass" if fault is None else fault.admission
        if fault is not None and admission == "reset":
            fault.tally.touch(number)
            _reset(client)
            return
        pair = _Pair(number, self._random)
        try:
            self._pairs[number] = pair
            await pair.open(client, None if admission in ("silent", "unanswered") else self._to)
            if pair.server is None and fault is not None:
                fault.tally.touch(number)
            await self._carry(pair)
            if pair.server is not None and self._fault is not None and self._fault.hides_the_end:
                await self._calm.wait()
        except (OSError, TimeoutError) as error:
            log.debug("connection %d ended: %s", number, error)
        finally:
            del self._pairs[number]
            pair.abort()

    async def _carry(self, pair: _Pair) -> None:
        """Until both directions have ended, or one of them broke."""
        try:
            async with asyncio.TaskGroup() as tasks:
                if pair.client is not None:
                    tasks.create_task(self._take(pair, pair.up, pair.client[0]))
                    tasks.create_task(self._give(pair, "down", pair.client[1]))
                if pair.server is not None:
                    tasks.create_task(self._take(pair, pair.down, pair.server[0]))
                    tasks.create_task(self._give(pair, "up", pair.server[1]))
        except* OSError as errors:
            log.debug("connection %d broke: %s", pair.number, errors.exceptions)

    async def _take(self, pair: _Pair, flow: Flow, reader: asyncio.StreamReader) -> None:
        """What one side says, into the queues, as the fault wants it."""
        loop = asyncio.get_running_loop()
        data = b"-"
        while data:
            data = await reader.read(CHUNK)
            if pair.server is None:
                self._swallow(pair, data)
                continue
            for piece in self._shaped(flow, data, loop.time()):
                if piece.back:
                    await pair.waiting[_OTHER[flow.direction]].put(piece)
                else:
                    flow.last_due = piece.due
                    await pair.waiting[flow.direction].put(piece)

    def _shaped(self, flow: Flow, data: bytes, now: float) -> list[Piece]:
        if self._fault is None:
            return [Piece(now, data)]
        return list(self._fault.shape(flow, data, now))

    def _swallow(self, pair: _Pair, data: bytes) -> None:
        """From a client behind whose connection there is no server."""
        if not data:
            raise ConnectionError("the client hung up")
        if self._fault is not None:
            self._fault.tally.touch(pair.number, len(data))

    async def _give(self, pair: _Pair, direction: Direction, writer: asyncio.StreamWriter) -> None:
        """What waits for one side, when it is due and nothing holds it."""
        loop = asyncio.get_running_loop()
        while True:
            piece = await pair.waiting[direction].get()
            await self._until(piece.due - loop.time())
            while self._fault is not None and direction in self._fault.holds:
                await self._calm.wait()
            if not piece.data:
                with suppress(OSError):
                    writer.write_eof()
                return
            writer.write(piece.data)
            await writer.drain()

    async def _until(self, seconds: float) -> None:
        """Wait, but not longer than the fault lasts."""
        if seconds > 0:
            with suppress(TimeoutError):
                async with asyncio.timeout(seconds):
                    await self._calm.wait()


_OTHER: dict[Direction, Direction] = {"up": "down", "down": "up"}
_Stream = tuple[asyncio.StreamReader, asyncio.StreamWriter]


class _Pair:
    """One connection: the client's half, and the server's unless a fault kept it away."""

    def __init__(self, number: int, random: Random) -> None:
        self.number = number
        self.notes: dict[str, object] = {}
        self.up = Flow(number, "up", random, self.notes)
        self.down = Flow(number, "down", random, self.notes)
        self.waiting: dict[Direction, asyncio.Queue[Piece]] = {
            "up": asyncio.Queue(MAX_WAITING),
            "down": asyncio.Queue(MAX_WAITING),
        }
        self.client: _Stream | None = None
        self.server: _Stream | None = None
        self._silent = False

    async def open(self, client: socket.socket, to: tuple[str, int] | None) -> None:
        """Raises OSError or TimeoutError when the server is not reached."""
        client.setblocking(False)
        client.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.client = await asyncio.open_connection(sock=client, limit=CHUNK)
        self._silent = to is None
        if to is not None:
            async with asyncio.timeout(CONNECT_SECONDS):
                self.server = await asyncio.open_connection(*to, limit=CHUNK)

    @property
    def spoiled(self) -> bool:
        return self._silent or self.up.spoiled or self.down.spoiled

    def abort(self) -> None:
        """Reset both halves."""
        for stream in (self.client, self.server):
            if stream is not None:
                _linger(stream[1].get_extra_info("socket"))
                stream[1].transport.abort()


def _linger(found: socket.socket | None) -> None:
    """Closing sends RST instead of FIN."""
    if found is not None:
        with suppress(OSError):
            found.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))


def _reset(client: socket.socket) -> None:
    _linger(client)
    client.close()
