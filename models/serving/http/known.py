"""The head of the last request, so that one that comes again is not parsed again: programs send the same head all day."""

from __future__ import annotations

from models.serving.exchange import HttpHead, HttpRequest

MAX_KNOWN_BYTES = 1024 * 1024
"""Longest request whose head is remembered for the next one."""
_SPECIAL = (b"transfer-encoding", b"connection", b"expect", b"upgrade")


class KnownHead:
    """Holds for reads that begin at the start of a request: then the same bytes mean the same."""

    __slots__ = ("_begun", "_bytes", "_head", "_read")

    def __init__(self) -> None:
        self._begun = b""  # head of a request whose body has not all come
        self._bytes = b""
        self._head: HttpHead | None = None
        self._read = -1

    def match(self, data: bytes) -> HttpRequest | None:
        """The request that `data` is, when its head is the last one's, to the byte, and it is as long."""
        if len(data) == self._read and self._head is not None and data.startswith(self._bytes):
            return HttpRequest(self._head, data[len(self._bytes) :])
        return None

    def begins(self, data: bytes) -> tuple[HttpHead, bytes, int] | None:
        """The head that `data` begins with, when it is the last one's, the part of the body behind it, and what is missing."""
        if len(data) < self._read and self._head is not None and data.startswith(self._bytes):
            return self._head, data[len(self._bytes) :], self._read - len(data)
        return None

    def learn(self, data: bytes, request: HttpRequest) -> None:
        """`data` was exactly `request`."""
        # The first empty line ends the head: nothing may stand before the request, nor after it.
        end = data.find(b"\r\n\r\n") + 4
        if end == len(data) - len(request.body):
            self._keep(data[:end], request)

    def begin(self, data: bytes, body_bytes: int) -> None:
        """`data` was a head and the first `body_bytes` of the body behind it; b"" = a head that did not come like that."""
        end = data.find(b"\r\n\r\n") + 4
        self._begun = data[:end] if data and end == len(data) - body_bytes else b""

    def learn_begun(self, request: HttpRequest) -> None:
        """The request that has begun is whole now."""
        if self._begun:
            self._keep(self._begun, request)
            self._begun = b""

    def _keep(self, head: bytes, request: HttpRequest) -> None:
        headers, size = request.head.headers, len(request.body)
        read = len(head) + size
        if read > MAX_KNOWN_BYTES or any(name in headers for name in _SPECIAL):
            return
        # A chunked body has its length elsewhere than in the head: such a one is not kept.
        if int(headers.get(b"content-length", b"0")) == size:
            self._bytes, self._head, self._read = head, request.head, read

    def forget(self) -> None:
        self._head, self._read = None, -1
