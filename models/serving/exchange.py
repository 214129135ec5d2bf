"""What a pure handler is given and what it gives back. Knows nothing of sockets."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine, Iterable
from pathlib import Path
from typing import Any, Protocol

import msgspec

from models.errors import Overloaded, TierlineError, Unauthenticated
from models.serving.caller import LOCAL_PEER, Peer

JSON = b"content-type: application/json\r\n"
OCTETS = b"content-type: application/octet-stream\r\n"


class Sending(Protocol):
    """Lives as long as the answer it belongs to, and hears how many bytes of the file were read for it."""

    def sent(self, size: int) -> None: ...


class FileBody(msgspec.Struct, frozen=True):
    """`length` bytes of the file at `path`, from byte `offset` on; read while they are sent."""

    path: Path
    offset: int
    length: int
    sending: Sending | None = None


class Upgrade(msgspec.Struct, frozen=True):
    """The connection changes to another protocol: `start` makes it, once the 101 is written.

    It is then called like any protocol of its own: `connection_made`, and `data_received` with what had already arrived.
    """

    start: Callable[[], asyncio.Protocol]


class HttpHead(msgspec.Struct):
    """A request without its body. `path` is still percent-encoded; `query` is what follows '?', or ''.

    `headers`: names in lower case; of a header sent twice, the last one counts. `memo`: a handler may keep here what it has
    worked out from the head alone: a connection hands the same object over again when the same bytes come again.
    """

    method: str
    path: str
    query: str
    headers: dict[bytes, bytes]
    peer: Peer = LOCAL_PEER
    memo: Any = None


class HttpRequest(msgspec.Struct):
    """A complete request."""

    head: HttpHead
    body: bytes = b""

    @property
    def method(self) -> str:
        return self.head.method

    @property
    def path(self) -> str:
        return self.head.path

    @property
    def query(self) -> str:
        return self.head.query

    @property
    def headers(self) -> dict[bytes, bytes]:
        return self.head.headers

    @property
    def peer(self) -> Peer:
        return self.head.peer


class HttpResponse(msgspec.Struct):
    """An answer. `headers` are ready lines, each ended by CRLF (`header_lines` makes them); lengths are added by the server.

    A body of `Upgrade` belongs to status 101 alone.
    """

    status: int
    headers: bytes = JSON
    body: bytes | list[bytes] | FileBody | Upgrade = b""


Handler = Callable[[HttpRequest], Coroutine[Any, Any, HttpResponse]]


def header_lines(headers: Iterable[tuple[str, str]]) -> bytes:
    """Header lines ready to send. Raises ValueError for a value that would end its line."""
    lines = []
    for name, value in headers:
        line = f"{name}: {value}"
        if not line.isprintable():
            raise ValueError(f"header {name!r} holds a character that cannot be sent")
        lines.append(line + "\r\n")
    return "".join(lines).encode("latin-1")


def error_body(message: str) -> bytes:
    """`{"error": message}`, the one form of every error."""
    # A surrogate that came out of a broken name would make the body undecodable.
    return msgspec.json.encode({"error": message.encode("utf-8", "replace").decode()})


def error_response(error: TierlineError) -> HttpResponse:
    """The answer that an error of the tree stands for."""
    headers = JSON
    if isinstance(error, Overloaded):
        headers += b"retry-after: %d\r\n" % max(1, round(error.retry_after + 0.5))
    elif isinstance(error, Unauthenticated):
        headers += b"www-authenticate: Bearer\r\n"
    return HttpResponse(error.http, headers, error_body(str(error)))
