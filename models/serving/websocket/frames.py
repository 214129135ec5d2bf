"""RFC 6455 between bytes and messages, on the sans-I/O half of the `websockets` library: the one file that imports it.

Extensions are never negotiated: permessage-deflate would let a few bytes mean many.
"""

from __future__ import annotations

import http
import logging
from collections.abc import Iterator, Mapping, Sequence

try:
    from websockets.datastructures import Headers
    from websockets.exceptions import NegotiationError
    from websockets.frames import Frame, Opcode
    from websockets.http11 import Request
    from websockets.protocol import State
    from websockets.server import ServerProtocol
    from websockets.typing import Subprotocol
except ImportError as error:
    raise ImportError("WebSocket needs the package websockets: pip install 'tierline[edge]'") from error

SUBPROTOCOL = Subprotocol("tierline.v2")
GOING_AWAY, INVALID_DATA, POLICY, TOO_BIG, UNIDENTIFIED = 1001, 1007, 1008, 1009, 4401
"""Close codes: of RFC 6455 7.4.1, and one of our own that stands for HTTP's 401."""
END = b""
"""Among bytes to send: no more will follow."""

_log = logging.getLogger("tierline.websocket.frames")


def handshake(path: str, headers: Mapping[bytes, bytes]) -> tuple[int, list[tuple[str, str]], str]:
    """Status and headers of the answer to a request to upgrade, and why, unless the status is 101."""
    given = Headers([(name.decode("latin-1"), value.decode("latin-1")) for name, value in headers.items()])
    protocol = ServerProtocol(select_subprotocol=_choose, logger=_log)
    answer = protocol.accept(Request(path, given))
    if answer.status_code == http.HTTPStatus.SWITCHING_PROTOCOLS:
        # The server adds date and connection to every answer itself.
        kept = [pair for pair in answer.headers.raw_items() if pair[0].lower() not in ("date", "connection")]
        return answer.status_code, kept, ""
    upgrade = [("upgrade", "websocket")] if answer.status_code == http.HTTPStatus.UPGRADE_REQUIRED else []
    return answer.status_code, upgrade, f"this is no WebSocket handshake: {protocol.handshake_exc}"


def _choose(protocol: ServerProtocol, offered: Sequence[Subprotocol]) -> Subprotocol | None:
    if offered and SUBPROTOCOL not in offered:
        raise NegotiationError(f"the subprotocol here is {SUBPROTOCOL}")
    return SUBPROTOCOL if offered else None


class Frames:
    """The server's side of one connection after its handshake. What is to be sent is fetched by `take` after every call."""

    def __init__(self, message_bytes: int, message_frames: int, text_bytes: int) -> None:
        self._protocol = ServerProtocol(state=State.OPEN, max_size=message_bytes, logger=_log)
        self._message_frames = message_frames
        self._text_bytes = text_bytes
        self._parts: list[bytes] = []
        self._is_text = False

    @property
    def is_open(self) -> bool:
        """Whether messages may still be sent."""
        return self._protocol.state is State.OPEN

    def receive(self, data: bytes) -> Iterator[tuple[bool | None, bytes | None]]:
        """What came, frame by frame: messages as (is text, payload), (None, payload) for pings and pongs, (None, None) for a
        frame that ends no message. What breaks the rules ends the session.

        All of `data` is taken apart when the first is asked for: give it in small pieces.
        """
        self._protocol.receive_data(data)
        for event in self._protocol.events_received():
            assert isinstance(event, Frame)
            if event.opcode in (Opcode.PING, Opcode.PONG):
                yield None, bytes(event.data)
            else:
                yield (None, None) if event.opcode is Opcode.CLOSE else self._gather(event)

    def _gather(self, frame: Frame) -> tuple[bool | None, bytes | None]:
        if not self.is_open:
            return None, None
        if frame.opcode is not Opcode.CONT:
            self._is_text = frame.opcode is Opcode.TEXT
        self._parts.append(bytes(frame.data))
        if len(self._parts) > self._message_frames:
            self._protocol.fail(TOO_BIG, f"a message has at most {self._message_frames} frames")
        elif frame.fin:
            message = self._parts[0] if len(self._parts) == 1 else b"".join(self._parts)
            self._parts.clear()
            if self._is_text and len(message) > self._text_bytes:
                self._protocol.fail(TOO_BIG, f"a text message has at most {self._text_bytes} bytes, send a binary one")
            elif self._is_text and not _is_utf8(message):
                self._protocol.fail(INVALID_DATA, "a text message is not UTF-8")
            else:
                return self._is_text, message
        return None, None

    def end(self) -> None:
        """The client sends no more."""
        self._protocol.receive_eof()

    def text(self, message: bytes) -> None:
        self._protocol.send_text(message)

    def binary(self, message: bytes) -> None:
        self._protocol.send_binary(message)

    def ping(self) -> None:
        self._protocol.send_ping(b"")

    def close(self, code: int, reason: str) -> None:
        if self.is_open:
            self._protocol.send_close(code, reason)

    def take(self) -> list[bytes]:
        """What is to be sent now; `END` comes last."""
        return self._protocol.data_to_send()


def _is_utf8(message: bytes) -> bool:
    try:
        message.decode()
    except UnicodeDecodeError:
        return False
    return True
