"""Bytes of one client to whole requests on httptools, held to the server's limits while they arrive. No sockets here.

Sources: RFC 9112 (messages), RFC 9110 (semantics).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, cast

import httptools

from models.errors import InvalidRequest, TierlineError, TooLarge
from models.serving.caller import LOCAL_PEER
from models.serving.exchange import HttpHead, HttpRequest
from models.serving.http.body import (
    SMALL_BODY_BYTES,
    ArrivingBody,
    BodyBudget,
    body_too_large,
    head_too_large,
    held_too_much,
)
from models.serving.http.known import KnownHead
from models.serving.http.slot import Slot, path_of_absolute

if TYPE_CHECKING:
    from models.serving.http.service import HttpService

IDLE, HEAD, BODY, REST = range(4)
"""What arrives now: nothing, a request's head, its body, the body of one whose head is known."""


class RequestReader(ABC):
    """What becomes of a request that is whole, or has to be refused, is for whoever inherits to say."""

    def __init__(self, service: HttpService) -> None:
        self._service = service
        self._limits = service.limits
        self._peer = LOCAL_PEER
        self._url: list[bytes] = []
        self._raw: dict[bytes, bytes] = {}
        self._headers: dict[bytes, bytes] = {}
        self._parts: list[bytes] = []
        # httptools calls these as the containers' own methods want to be called: no Python frame per header or piece.
        self.on_url = self._url.append
        self.on_header = self._raw.__setitem__
        self.on_body = self._parts.append
        self._parser = httptools.HttpRequestParser(self)
        self._known = KnownHead()
        self._completed: HttpRequest | None = None  # by this read alone
        self._whole = 0  # requests that this read completed
        self._rest_of: HttpHead | None = None
        self._missing = 0  # bytes of its body
        self._phase = IDLE
        self._since = service.seconds  # when the phase began
        self._partial = 0  # bytes received of an unfinished head
        self._arriving = ArrivingBody(self._parts, self._raw, service.limits)
        self._budget = BodyBudget(service, service.limits)
        self._body_begun = False  # the body's announced length was checked
        self._continue_due = False  # the client waits for a 100 before it sends the body
        self._large_read = False  # this read could hold a whole head above the limit
        self._feeding = False
        self._deaf = False  # nothing more is read from this client, its last answer closes the connection

    @abstractmethod
    def answered(self) -> None:
        """A slot of this client has got its response."""

    @abstractmethod
    def _admit(self, slot: Slot) -> None:
        """A request is whole."""

    @abstractmethod
    def _refuse(self, error: TierlineError, status: int | None = None) -> None:
        """Nothing more is read: answer with `error`, or `status`, and end."""

    @abstractmethod
    def _stop_reading(self, rest: bytes) -> None:
        """A request asks for another protocol: `rest` came behind it and is not HTTP/1.1."""

    def _parse(self, data: bytes) -> None:
        """All that one read brought."""
        self._completed = None
        self._whole = 0
        self._large_read = len(data) > self._limits.header_bytes
        self._feeding = True
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserCallbackError:
            raise
        except httptools.HttpParserUpgrade as stopped:
            # Answered as it is unless the handler upgrades (RFC 9110 7.8); what follows it is not HTTP/1.1.
            self._deaf = True
            self._stop_reading(data[stopped.args[0] :])
        except httptools.HttpParserError as error:
            self._refuse(InvalidRequest(f"malformed HTTP: {error}"))
        finally:
            self._feeding = False

    def _learn(self, data: bytes, idle: bool) -> None:
        """`data` has been parsed, `idle`: from the start of a request on. Remember the head for the next one."""
        if self._phase != IDLE and not self._deaf:
            if idle or self._whole:
                whole_head = idle and not self._whole and self._phase == BODY
                self._known.begin(data if whole_head else b"", sum(map(len, self._parts)))
        elif self._completed is not None:
            if idle:
                self._known.learn(data, self._completed)
            else:
                self._known.learn_begun(self._completed)
        elif not self._whole:
            # The parser is between two requests and has eaten something: line ends that some clients send.
            self._known.forget()

    # --- a body whose head is known, without the parser ----------------------------------------------------------------

    def _begin_rest(self, head: HttpHead, data: bytes, missing: int) -> None:
        """`data`: the body's beginning; `missing`: bytes that follow it."""
        self._phase = REST
        self._since = self._service.seconds
        self._rest_of = head
        self._missing = missing + len(data)
        self._arriving.begin()
        self._take_rest(data)

    def _take_rest(self, data: bytes) -> bytes:
        """Take what belongs to the body; what stands behind it is given back."""
        missing = self._missing
        if len(data) >= missing:
            self._end_rest(data if len(data) == missing else data[:missing])
            return data[missing:]
        self._missing -= len(data)
        if data:
            self._parts.append(data)
        self._arriving.join()
        if not self._budget.arrive(len(data)):
            self._refuse(held_too_much())
        return b""

    def _end_rest(self, data: bytes) -> None:
        self._phase = IDLE
        self._parts.append(data)
        body = b"".join(self._parts)
        self._parts.clear()
        self._budget.arrived()
        head, self._rest_of = cast(HttpHead, self._rest_of), None
        self._feeding = True
        self._admit_whole(Slot(self, HttpRequest(head, body), keep_alive=True), len(body))
        self._feeding = False

    def _admit_whole(self, slot: Slot, body_bytes: int) -> None:
        if body_bytes > SMALL_BODY_BYTES:
            slot.held = self._budget.hold(body_bytes)
        self._admit(slot)

    # --- called by the parser ------------------------------------------------------------------------------------------

    def on_message_begin(self) -> None:
        self._phase = HEAD
        self._since = self._service.seconds
        self._partial = 0

    def on_headers_complete(self) -> None:
        # Copied here, so that trailers of a chunked body never pass for headers (RFC 9110 6.5.1).
        self._headers = {name.lower(): value for name, value in self._raw.items()}
        self._raw.clear()
        self._phase = BODY
        self._body_begun = False
        if self._large_read:
            self._check_head()

    def on_message_complete(self) -> None:
        self._phase = IDLE
        if self._deaf:
            return
        parts = self._parts
        body = parts[0] if len(parts) == 1 else b"".join(parts)
        parts.clear()
        self._raw.clear()
        target = self._url[0] if len(self._url) == 1 else b"".join(self._url)
        self._url.clear()
        self._budget.arrived()
        if len(body) > self._limits.body_bytes:
            self._refuse(body_too_large(self._limits))
            return
        headers = self._headers
        if len(headers) > self._limits.header_count:
            self._refuse(head_too_large(self._limits))
            return
        path, _, query = target.decode("latin-1").partition("?")
        if not path.startswith("/"):
            path = path_of_absolute(path)
        parser = self._parser
        request = HttpRequest(HttpHead(parser.get_method().decode("latin-1"), path, query, headers, self._peer), body)
        slot = Slot(self, request, parser.should_keep_alive())
        if parser.get_http_version() == "1.0":
            slot.old = b"connection" in headers
            self._whole = 2
        self._whole += 1
        self._completed = request if self._whole == 1 and slot.keep_alive else None
        if not slot.keep_alive:
            self._deaf = True
        self._admit_whole(slot, len(body))

    def _check_head(self) -> None:
        size = sum(map(len, self._url)) + sum(len(name) + len(value) for name, value in self._headers.items())
        if size > self._limits.header_bytes:
            self._refuse(head_too_large(self._limits))

    def _check_partial(self, received: int) -> None:
        """A head or body has begun and not ended: hold it to the limits before more of it comes."""
        if self._phase == HEAD:
            if not self._whole:
                # What came behind other requests of the same read is less than that read.
                self._partial += received
            if self._partial > self._limits.header_bytes or len(self._raw) > self._limits.header_count:
                self._refuse(head_too_large(self._limits))
            return
        if not self._body_begun:
            self._begin_body()
        else:
            try:
                self._arriving.check(received)
            except TooLarge as error:
                self._refuse(error)
                return
        if not self._deaf and not self._budget.arrive(received):
            self._refuse(held_too_much())

    def _begin_body(self) -> None:
        self._body_begun = True
        self._arriving.begin()
        self._since = self._service.seconds
        # HTTP/1.0 knows no interim answers.
        expects = self._headers.get(b"expect", b"").lower() == b"100-continue"
        self._continue_due = expects and self._parser.get_http_version() != "1.0"
        # llhttp has checked that it is a number that fits 64 bits.
        if int(self._headers.get(b"content-length", b"0")) > self._limits.body_bytes:
            self._refuse(body_too_large(self._limits))
