"""One request to a hub and its answer, in the calling thread: enrolment, renewal, leaving. Bounded in time and size."""

from __future__ import annotations

import socket
import ssl
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from threading import Timer
from typing import Any

import msgspec
import urllib3

from sync.clock import SystemClock
from sync.enrol_messages import MAX_ANSWER_BYTES
from sync.errors import Malformed, Refused, Unavailable
from sync.tunnel import read_proxy

CONNECT_SECONDS = 10.0
READ_SECONDS = 20.0
TOTAL_SECONDS = 60.0
"""A peer that drips a byte at a time, of its headers or its body, passes every read timeout."""
MAX_TEXT_CHARS = 500
"""Of what a hub says when it refuses: it goes to a terminal or a log, and at a first contact nobody vouches for the hub."""


class HubRefused(Refused):
    """The hub answered no; the message is its own. `status`: of HTTP."""

    def __init__(self, status: int, text: str) -> None:
        super().__init__(text)
        self.status = status


class _Error(msgspec.Struct, frozen=True):
    error: str = ""


def call(url: str, body: msgspec.Struct | None, context: ssl.SSLContext | None, proxy: str | None = None) -> bytes:
    """POST `body` as JSON, or GET without one. Raises HubRefused, Unavailable, Malformed."""
    data = None if body is None else msgspec.json.encode(body)
    headers = {"content-type": "application/json", "accept-encoding": "identity"}
    timeout = urllib3.Timeout(connect=CONNECT_SECONDS, read=READ_SECONDS)
    end = time.monotonic() + TOTAL_SECONDS
    try:
        with _manager(proxy, context, timeout) as manager, _ending(manager.connection_from_url(url), TOTAL_SECONDS):
            answer = manager.request(
                "GET" if body is None else "POST",
                url,
                body=data,
                headers=headers,
                redirect=False,
                preload_content=False,
            )
            try:
                content = _read(answer, end)
            finally:
                answer.close()
    except (urllib3.exceptions.HTTPError, OSError, ValueError) as error:
        why = f"no answer within {TOTAL_SECONDS:g} s" if time.monotonic() >= end else _cause(error)
        raise Unavailable(f"{url}: {why}") from error
    if len(content) > MAX_ANSWER_BYTES:
        raise Malformed(f"{url} answered more than {MAX_ANSWER_BYTES} bytes")
    if answer.status >= 500:
        raise Unavailable(f"{url} answered {answer.status}")
    if not 200 <= answer.status < 300:
        raise HubRefused(answer.status, _text(content) or f"{url} answered {answer.status}")
    return content


def _read(answer: urllib3.BaseHTTPResponse, end: float) -> bytes:
    content = bytearray()
    while len(content) <= MAX_ANSWER_BYTES:
        # read1: what is there now. A plain read waits for all of it.
        piece = answer.read1(MAX_ANSWER_BYTES + 1 - len(content), decode_content=False)
        if time.monotonic() >= end:
            raise TimeoutError
        if not piece:
            break
        content += piece
    length = answer.headers.get("content-length", "")
    if length.isdecimal() and len(content) < min(int(length), MAX_ANSWER_BYTES + 1):
        raise OSError("the connection ended in the middle of the answer")
    return bytes(content)


@contextmanager
def _ending(pool: urllib3.HTTPConnectionPool, seconds: float) -> Iterator[None]:
    """Cuts the pool's connections after `seconds`, whatever they wait for."""
    watched: list[socket.socket] = []
    plain = pool.ConnectionCls

    def connect(*arguments: Any, **options: Any) -> Any:
        connection: Any = plain(*arguments, **options)
        open_socket: Callable[[], socket.socket] = connection._new_conn

        def opened() -> socket.socket:
            made = open_socket()
            watched.append(made.dup())  # of our own: TLS takes the first one over
            return made

        connection._new_conn = opened
        return connection

    def cut() -> None:
        for each in list(watched):
            try:
                each.shutdown(socket.SHUT_RDWR)
            except OSError:
                continue  # it ended by itself

    pool.ConnectionCls = connect  # type: ignore[assignment]
    timer = Timer(seconds, cut)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()
        for each in watched:
            each.close()


def _manager(
    proxy: str | None, context: ssl.SSLContext | None, timeout: urllib3.Timeout
) -> urllib3.PoolManager | urllib3.ProxyManager:
    if proxy is None:
        return urllib3.PoolManager(retries=False, timeout=timeout, ssl_context=context)
    at = read_proxy(proxy)
    headers = {"Proxy-Authorization": at.credentials} if at.credentials else None
    host = f"[{at.host}]" if ":" in at.host else at.host
    return urllib3.ProxyManager(
        f"http://{host}:{at.port}", proxy_headers=headers, retries=False, timeout=timeout, ssl_context=context
    )


def _text(content: bytes) -> str:
    try:
        text = msgspec.json.decode(content, type=_Error).error
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
        return ""
    return "".join(char if char.isprintable() else "?" for char in text[:MAX_TEXT_CHARS])


def _cause(error: BaseException) -> str:
    inner = error.__cause__ or getattr(error, "reason", None) or error
    text = str(inner) or type(inner).__name__
    if "not yet valid" in text or "has expired" in text:
        now = datetime.fromtimestamp(SystemClock().wall(), UTC).isoformat(timespec="seconds")
        text += f"; is this machine's clock right? It says {now}"
    return text
