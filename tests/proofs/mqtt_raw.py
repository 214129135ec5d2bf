"""A small MQTT 3.1.1 client on raw asyncio: what lets one process be a thousand nodes. For simulations only.

One connection, QoS 0 and 1, a will, no redelivery: whoever uses it says everything anew after a reconnect, as nodes do.
Source: MQTT 3.1.1, OASIS standard, sections 2 and 3.
"""

from __future__ import annotations

import asyncio
import struct
from collections.abc import Callable

CONNECT, CONNACK, PUBLISH, PUBACK, SUBSCRIBE, SUBACK, PINGREQ, DISCONNECT = 1, 2, 3, 4, 8, 9, 12, 14
MAX_PACKET = 1 << 20


def _text(value: str | bytes) -> bytes:
    data = value.encode() if isinstance(value, str) else value
    return struct.pack("!H", len(data)) + data


def _packet(kind: int, flags: int, body: bytes) -> bytes:
    head, length = bytearray((kind << 4 | flags,)), len(body)
    while True:
        length, digit = divmod(length, 128)
        head.append(digit | (128 if length else 0))
        if not length:
            return bytes(head) + body


class RawMqtt(asyncio.Protocol):
    """`on_up()` after CONNACK, `on_message(topic, payload)`, `on_down()` once at the end; all in the event loop."""

    def __init__(
        self,
        client_id: str,
        password: str,
        will: tuple[str, bytes],
        on_up: Callable[[], None],
        on_message: Callable[[str, bytes], None],
        on_down: Callable[[], None],
        keepalive: int = 60,
    ) -> None:
        self._hello = (client_id, password, will, keepalive)
        self._on_up, self._on_message, self._on_down = on_up, on_message, on_down
        self._transport: asyncio.Transport | None = None
        self._buffer = bytearray()
        self._id = 0
        self._pings: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport
        client_id, password, (topic, payload), keepalive = self._hello
        # User name, password, retained will of QoS 1, clean session.
        variable = _text("MQTT") + bytes((4, 0b1110_1110)) + struct.pack("!H", keepalive)
        body = variable + _text(client_id) + _text(topic) + _text(payload) + _text(client_id) + _text(password)
        transport.write(_packet(CONNECT, 0, body))

    def connection_lost(self, error: Exception | None) -> None:
        if self._pings is not None:
            self._pings.cancel()
        self._transport = None
        self._on_down()

    def data_received(self, data: bytes) -> None:
        self._buffer += data
        while (packet := self._take()) is not None:
            self._handle(*packet)

    def _take(self) -> tuple[int, bytes] | None:
        length = shift = 0
        for index in range(1, 5):
            if index >= len(self._buffer):
                return None
            digit = self._buffer[index]
            length |= (digit & 127) << shift
            shift += 7
            if digit < 128:
                break
        start = index + 1
        if length > MAX_PACKET or len(self._buffer) < start + length:
            return None
        head, body = self._buffer[0], bytes(self._buffer[start : start + length])
        del self._buffer[: start + length]
        return head, body

    def _handle(self, head: int, body: bytes) -> None:
        kind = head >> 4
        if kind == CONNACK:
            if body[1]:
                self.close()
                return
            self._ping()
            self._on_up()
        elif kind == PUBLISH:
            size = struct.unpack_from("!H", body)[0]
            topic, rest = body[2 : 2 + size].decode(), body[2 + size :]
            if head >> 1 & 3:
                self._write(_packet(PUBACK, 0, rest[:2]))
                rest = rest[2:]
            self._on_message(topic, rest)

    def _ping(self) -> None:
        self._write(_packet(PINGREQ, 0, b""))
        self._pings = asyncio.get_running_loop().call_later(self._hello[3] / 2, self._ping)

    def _write(self, data: bytes) -> None:
        if self._transport is not None:
            self._transport.write(data)

    def _next(self) -> bytes:
        self._id = self._id % 65_535 + 1
        return struct.pack("!H", self._id)

    def subscribe(self, *filters: str) -> None:
        self._write(_packet(SUBSCRIBE, 2, self._next() + b"".join(_text(each) + b"\1" for each in filters)))

    def publish(self, topic: str, payload: bytes, *, retain: bool = False) -> None:
        """QoS 1."""
        self._write(_packet(PUBLISH, 2 | retain, _text(topic) + self._next() + payload))

    def close(self) -> None:
        if self._transport is not None:
            self._transport.abort()
