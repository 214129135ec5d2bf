"""How long somebody may take to say what he wants, and in how many bytes: what uvicorn's HTTP protocol leaves open.

Without it 512 connections that never say a word keep everybody else out, and headers without end fill the memory, both before
anybody has to show a token.
"""

from __future__ import annotations

import asyncio

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

HEAD_SECONDS = 10.0
"""From the connection, or the first byte after an answer, to the end of the headers."""
MAX_HEAD_BYTES = 64 * 1024
"""Of one request, rounded up to what arrived at once. A node's longest has 3 kB."""


class BoundedHttp(HttpToolsProtocol):
    """One connection."""

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        self._in_head, self._turned, self._head_bytes = True, False, 0
        self._alarm: asyncio.TimerHandle | None = None
        super().connection_made(transport)
        self._wait_for_head()

    def connection_lost(self, exc: Exception | None) -> None:
        self._head_came()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        self._turned = False
        super().data_received(data)
        if not self._in_head or self._turned or self.transport.is_closing():
            return
        self._head_bytes += len(data)
        if self._head_bytes > MAX_HEAD_BYTES:
            self.send_400_response("The headers are too long.")
        elif self._alarm is None:
            self._wait_for_head()

    def on_message_begin(self) -> None:
        super().on_message_begin()
        if self._alarm is None:
            self._wait_for_head()

    def on_headers_complete(self) -> None:
        self._in_head = False
        self._head_came()
        super().on_headers_complete()

    def on_message_complete(self) -> None:
        # What came together with the end of a request is not the next one's head yet, whatever its size.
        self._in_head, self._turned, self._head_bytes = True, True, 0
        super().on_message_complete()

    def _wait_for_head(self) -> None:
        self._alarm = self.loop.call_later(HEAD_SECONDS, self._late)

    def _head_came(self) -> None:
        if self._alarm is not None:
            self._alarm.cancel()
            self._alarm = None

    def _late(self) -> None:
        self._alarm = None
        if self.cycle is not None and not self.cycle.response_complete:
            self._wait_for_head()  # an answer to the request before is still on its way
        elif not self.transport.is_closing():
            self.transport.close()
