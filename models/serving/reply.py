"""Answers of an HTTP/1.1 server, read from bytes. Pure: shared by the connection of an event loop and the blocking one.

Source: RFC 9112.
"""

from __future__ import annotations

import httptools
import msgspec

from models.errors import Unreachable

MAX_RESPONSE_BYTES = 64 * 1024 * 1024
"""Largest answer that is read, as large as the largest request our own server takes by default."""
MAX_RESPONSE_HEAD_BYTES = 32 * 1024
MAX_RESPONSE_HEADERS = 100


class Reply(msgspec.Struct):
    """A complete answer. `headers`: names in lower case."""

    status: int
    headers: dict[bytes, bytes]
    body: bytes


class ReplyParser:
    """Reads the answers of one connection, one at a time. `peer` is named in errors.

    `begun`: bytes of an answer have come and it is not complete. `keep_alive`: of the last complete answer.
    """

    def __init__(self, peer: str) -> None:
        self._peer = peer
        self.begun = False
        self.keep_alive = True
        self._raw: dict[bytes, bytes] = {}
        self._body: list[bytes] = []
        self._received = 0  # bytes of the answer under way
        self._in_body = False
        self._replies: list[Reply] = []
        # httptools calls these as the containers' own methods want to be called.
        self.on_header = self._raw.__setitem__
        self.on_body = self._body.append
        self._parser = httptools.HttpResponseParser(self)

    def feed(self, data: bytes) -> Reply | None:
        """Take what has arrived. The answer that it completes, if any; raises Unreachable for what is none, or too large."""
        self._received += len(data)
        self.begun = True
        try:
            self._parser.feed_data(data)
        except (httptools.HttpParserError, httptools.HttpParserUpgrade) as error:
            raise Unreachable(f"{self._peer} did not answer in HTTP: {error}") from error
        if self._replies:
            # More answers than requests: nothing on this connection can be trusted.
            if len(self._replies) > 1 or self.begun:
                self.keep_alive = False
            reply = self._replies[0]
            self._replies.clear()
            return reply
        limit = MAX_RESPONSE_BYTES if self._in_body else MAX_RESPONSE_HEAD_BYTES + len(data)
        if self._received > limit or len(self._raw) > MAX_RESPONSE_HEADERS:
            raise Unreachable(f"{self._peer} sent an answer above {limit} bytes")
        return None

    def release(self) -> None:
        """Nothing more will be fed. The parser holds methods of this object: each one kept would be a cycle."""
        del self._parser

    # --- called by the parser --------------------------------------------------------------------------------------------

    def on_message_begin(self) -> None:
        self.begun = True

    def on_headers_complete(self) -> None:
        self._in_body = True

    def on_message_complete(self) -> None:
        status = self._parser.get_status_code()
        if status >= 200:
            self.keep_alive = self._parser.should_keep_alive()
            headers = {name.lower(): value for name, value in self._raw.items()}
            self._replies.append(Reply(status, headers, b"".join(self._body)))
            self.begun = False
        self._raw.clear()
        self._body.clear()
        self._received = 0
        self._in_body = False
