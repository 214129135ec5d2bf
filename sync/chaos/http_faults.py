"""Faults that understand HTTP/1.1. For clients that do not pipeline, and in clear text: what TLS hides passes untouched."""

from __future__ import annotations

from collections.abc import Iterator
from typing import cast

import httptools

from sync.chaos.faults import Fault, Flow, Piece, dripped

_HEAD_END = b"\r\n\r\n"


class Answer503(Fault):
    """Answers a share of requests with 503 without showing them to the server.

    `share`: 0..1, drawn per request. `retry_after`: seconds in the header of that name, None = no such header.
    """

    name = "cloud-503"

    def __init__(self, share: float = 1.0, retry_after: int | None = None) -> None:
        super().__init__()
        if not 0 < share <= 1:
            raise ValueError("share is more than 0, at most 1")
        self._share = share
        extra = "" if retry_after is None else f"Retry-After: {retry_after}\r\n"
        body = '{"error":"unavailable: fault injected"}'
        head = f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n"
        self._answer = f"HTTP/1.1 503 Service Unavailable\r\n{extra}{head}\r\n{body}".encode("ascii")

    def shape(self, flow: Flow, data: bytes, now: float) -> Iterator[Piece]:
        due = max(now, flow.last_due)
        if flow.direction == "down" or not data:
            yield Piece(due, data)
            return
        reader = cast(_Reader, flow.notes.setdefault(self.name, _Reader()))
        if reader.idle:
            reader.refusing = flow.random.random() < self._share
        refusing = reader.refusing
        complete = reader.feed(data)
        if complete is None:
            # The middle of a request that began before the fault, or no HTTP: it goes where its beginning went.
            yield Piece(due, data)
            return
        if not refusing:
            yield Piece(due, data)
            return
        flow.spoiled = not reader.idle
        self.tally.touch(flow.connection, len(data))
        self.tally.requests += complete
        if complete:
            yield Piece(due, self._answer * complete, back=True)


class SlowBody(Fault):
    """The head of every answer passes at once, its body at `rate` bytes per second."""

    name = "slow-body"

    def __init__(self, rate: float = 1_000.0) -> None:
        super().__init__()
        if rate <= 0:
            raise ValueError("rate is bytes per second, more than 0")
        self._rate = rate

    def shape(self, flow: Flow, data: bytes, now: float) -> Iterator[Piece]:
        due = max(now, flow.last_due)
        if flow.direction == "up":
            flow.notes[self.name] = b""  # a request: the next thing to come down is a head
            yield Piece(due, data)
            return
        tail = flow.notes.get(self.name)
        body = data
        if isinstance(tail, bytes):
            found = (tail + data).find(_HEAD_END)
            if found < 0:
                flow.notes[self.name] = (tail + data)[-3:]
                yield Piece(due, data)
                return
            flow.notes[self.name] = None
            cut = found + len(_HEAD_END) - len(tail)
            yield Piece(due, data[:cut])
            body = data[cut:]
        if body:
            self.tally.touch(flow.connection, len(body))
            yield from dripped(body, due, self._rate)
        elif not data:
            yield Piece(due, b"")


class _Reader:
    """Where a stream of requests stands. `idle`: between two. `refusing`: the verdict about the present one."""

    def __init__(self) -> None:
        self.idle = True
        self.refusing = False
        self._complete = 0
        self._parser = httptools.HttpRequestParser(self)

    def feed(self, data: bytes) -> int | None:
        """How many requests `data` completes; None when it is not the continuation of one that was seen to begin."""
        self._complete = 0
        try:
            self._parser.feed_data(data)
        except (httptools.HttpParserError, httptools.HttpParserUpgrade):
            self.idle = True
            self._parser = httptools.HttpRequestParser(self)
            return None
        return self._complete

    def on_message_begin(self) -> None:
        self.idle = False

    def on_message_complete(self) -> None:
        self.idle = True
        self._complete += 1
