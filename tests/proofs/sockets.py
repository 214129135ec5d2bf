"""Raw HTTP and WebSocket for the proofs: what a client library would not send, and answers read without trusting them."""

from __future__ import annotations

import json
import socket
import struct
import time
from collections.abc import Iterator
from typing import Any, NamedTuple

Address = tuple[str, int] | str
"""Host and port, or the path of a Unix socket."""
HANG_SECONDS = 5.0
"""An answer, or the end of the connection, must come within this time."""
WEBSOCKET_PATIENCE = 0.02
"""How long more answers of a session are waited for before this side closes it."""


class Hang(Exception):
    """Neither an answer nor the end of the connection came in time."""


class Broken(Exception):
    """What came back is not what the protocol allows."""


class Answer(NamedTuple):
    status: int
    headers: dict[str, str]
    body: bytes


def connect(address: Address) -> socket.socket:
    family = socket.AF_UNIX if isinstance(address, str) else socket.AF_INET
    link = socket.socket(family, socket.SOCK_STREAM)
    link.settimeout(HANG_SECONDS)
    link.connect(address)
    return link


def send_all(link: socket.socket, data: bytes, *, end: bool = True) -> None:
    """`end`: this side sends no more. A server that has refused may have closed already."""
    try:
        link.sendall(data)
        if end:
            link.shutdown(socket.SHUT_WR)
    except (BrokenPipeError, ConnectionResetError, OSError) as error:
        if isinstance(error, TimeoutError):
            raise Hang("the server stopped reading") from error


def read_to_end(link: socket.socket, seconds: float = HANG_SECONDS) -> bytes:
    """All that comes until the server closes. Raises Hang."""
    parts: list[bytes] = []
    end = time.monotonic() + seconds
    while (left := end - time.monotonic()) > 0:
        link.settimeout(left)
        try:
            part = link.recv(1 << 16)
        except TimeoutError:
            break
        except ConnectionResetError:
            return b"".join(parts)
        if not part:
            return b"".join(parts)
        parts.append(part)
    raise Hang(f"nothing more came for {seconds:g} s after {sum(map(len, parts))} bytes, and the connection stays open")


def exchange(address: Address, data: bytes) -> bytes:
    """Send, end this side, return all that comes back."""
    with connect(address) as link:
        send_all(link, data)
        return read_to_end(link)


def answers(data: bytes, *, head_only: bool = False) -> list[Answer]:
    """The answers in `data`. `head_only`: they are to HEAD requests. Raises Broken."""
    found: list[Answer] = []
    while data:
        head, separator, rest = data.partition(b"\r\n\r\n")
        lines = head.decode("latin-1").split("\r\n")
        words = lines[0].split(" ", 2)
        if not separator or words[0] not in ("HTTP/1.1", "HTTP/1.0") or not words[1].isdigit():
            raise Broken(f"no HTTP answer: {data[:200]!r}")
        headers = {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in lines[1:])}
        status = int(words[1])
        size = 0 if status < 200 or status == 304 else int(headers.get("content-length", "-1"))
        if size < 0 or (len(rest) < size and not head_only):
            raise Broken(f"the answer's body is not whole: {data[:200]!r}")
        if head_only and not rest[:size].startswith(b"{"):
            size = 0
        if status != 100:
            found.append(Answer(status, headers, rest[:size]))
        data = rest[size:]
    return found


def check_error(status: int, body: bytes) -> None:
    """A refusal says why, in the protocol's form. Raises Broken."""
    try:
        told = json.loads(body, parse_constant=_not_json)
    except ValueError as error:
        raise Broken(f"status {status}, the body does not parse: {body[:200]!r}") from error
    if not isinstance(told, dict) or set(told) != {"error"} or not isinstance(told["error"], str) or not told["error"]:
        raise Broken(f"status {status}, the body is no error: {body[:200]!r}")


def _not_json(name: str) -> None:
    raise ValueError(f"{name} is no JSON")


# --- WebSocket -----------------------------------------------------------------------------------------------------------

TEXT, BINARY, CLOSE = 1, 2, 8


def handshake(path: str = "/v2/ws", **changed: str | None) -> bytes:
    """A request to upgrade; a header changed to None is left out, `_` in its name is `-`."""
    headers: dict[str, str | None] = {
        "Host": "localhost",
        "Connection": "Upgrade",
        "Upgrade": "websocket",
        "Sec-WebSocket-Version": "13",
        "Sec-WebSocket-Key": "dGhlIHNhbXBsZSBub25jZQ==",
    }
    headers |= {name.replace("_", "-"): value for name, value in changed.items()}
    lines = "".join(f"{name}: {value}\r\n" for name, value in headers.items() if value is not None)
    return f"GET {path} HTTP/1.1\r\n{lines}\r\n".encode("latin-1", "replace")


def frame(opcode: int, payload: bytes, *, fin: bool = True, masked: bool = True, reserved: int = 0) -> bytes:
    first = fin << 7 | reserved << 4 | opcode
    size = len(payload)
    mask = masked << 7
    if size < 126:
        head = struct.pack("!BB", first, mask | size)
    elif size < 1 << 16:
        head = struct.pack("!BBH", first, mask | 126, size)
    else:
        head = struct.pack("!BBQ", first, mask | 127, size)
    return head + (b"\0\0\0\0" if masked else b"") + payload


def frames(data: bytes) -> Iterator[tuple[int, bytes]]:
    """The server's frames, opcode and payload; one that was cut off at the end is left out. Raises Broken."""
    while len(data) >= 2:
        size, offset = data[1] & 0x7F, 2
        if data[1] & 0x80:
            raise Broken("the server masks its frames")
        if size > 125:
            width = 2 if size == 126 else 8
            size, offset = int.from_bytes(data[2 : 2 + width]), 2 + width
        if len(data) < offset + size:
            return
        yield data[0] & 0xF, data[offset : offset + size]
        data = data[offset + size :]


def session(
    address: Address, data: bytes, opening: bytes | None = None
) -> tuple[Answer | None, list[tuple[int, bytes]]]:
    """Open a session, send `data`, then a close frame: the answer to the handshake, and all frames until the end."""
    with connect(address) as link:
        send_all(link, (opening or handshake()) + data, end=False)
        came = _read_for(link, WEBSOCKET_PATIENCE)
        send_all(link, frame(CLOSE, struct.pack("!H", 1000)))
        return _split(came + read_to_end(link))


def _read_for(link: socket.socket, seconds: float) -> bytes:
    """What comes until nothing has come for `seconds`, or the end."""
    parts: list[bytes] = []
    link.settimeout(seconds)
    try:
        while part := link.recv(1 << 16):
            parts.append(part)
    except (TimeoutError, ConnectionResetError):
        pass
    link.settimeout(HANG_SECONDS)
    return b"".join(parts)


def _split(came: bytes) -> tuple[Answer | None, list[tuple[int, bytes]]]:
    head, separator, rest = came.partition(b"\r\n\r\n")
    if not separator:
        return None, []
    if head.startswith(b"HTTP/1.1 101"):
        return Answer(101, {}, b""), list(frames(rest))
    return answers(came)[0], []


def message_of(opcode: int, payload: bytes) -> Any:
    """The JSON of a text message, or of the envelope of a binary one. Raises Broken."""
    try:
        if opcode == BINARY:
            (length,) = struct.unpack_from("<I", payload)
            payload = payload[4 : 4 + length]
        return json.loads(payload, parse_constant=_not_json)
    except (ValueError, struct.error) as error:
        raise Broken(f"the message does not parse: {payload[:200]!r}") from error
