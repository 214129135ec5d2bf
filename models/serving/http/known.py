"""The head of the last request, so that one that comes again is not parsed again: programs send the same head all day."""

from __future__ import annotations

from models.serving.exchange import HttpHead, HttpRequest

MAX_KNOWN_BYTES = 1024 * 1024
"""Longest request whose head is remembered for the next one."""
_SPECIAL = (b"transfer-encoding", b"connection", b"expect", b"upgrade")


class KnownHead:
    """Holds for reads that begin at the start of a request and hold all of it: then the same bytes mean the same."""

    __slots__ = ("_bytes", "_head", "_read")

    def __init__(self) -> None:
        self._bytes = b""
        self._head: HttpHead | None = None
        self._read = -1

    def match(self, data: bytes) -> HttpRequest | None:
        """The request that `data` is, when its head is the last one's, to the byte, and it is as long."""
        if len(data) == self._read and self._head is not None and data.startswith(self._bytes):
            return HttpRequest(self._head, data[len(self._bytes) :])
        return None

    def learn(self, data: bytes, request: HttpRequest) -> None:
        """`data` was exactly `request`. A chunked body has its length elsewhere than in the head: such a one is not kept."""
        headers, size = request.head.headers, len(request.body)
        if len(data) > MAX_KNOWN_BYTES or any(name in headers for name in _SPECIAL):
            return
        end = len(data) - size
        # The first empty line ends the head: nothing may stand before the request, nor after it.
        if int(headers.get(b"content-length", b"0")) == size and data.find(b"\r\n\r\n") + 4 == end:
            self._bytes, self._head, self._read = data[:end], request.head, len(data)

    def forget(self) -> None:
        self._head, self._read = None, -1
