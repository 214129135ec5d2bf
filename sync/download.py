"""One transfer over HTTP, in the calling thread. The only importer of urllib3."""

from __future__ import annotations

import re
import socket
import ssl
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from hashlib import sha256
from threading import Event, Lock
from typing import Any

import urllib3
from urllib3.connection import HTTPConnection, HTTPSConnection
from urllib3.util import parse_url

from sync import tunnel
from sync.errors import Absent, DigestMismatch, Malformed, SyncError, Unavailable
from sync.pace import Pace
from sync.part import CHUNK, Part
from sync.tunnel import Proxy

_RANGE = re.compile(r"bytes (\d+)-(\d+)/(\d+)")
MAX_RETRY_SECONDS = 300
"""Longest wait that a busy source may ask for at once."""
_ABSENT = (403, 404)
"""What servers say about a file they do not have: object stores that may not be listed answer 403."""


class Mismatch(DigestMismatch):
    """A source delivered, from the first byte on, something else than was signed for: it is of no use for this file."""


class Busy(Unavailable):
    """A source has the file, or will have it, and asks to come back after `seconds` (RFC 9110, 10.2.3)."""

    code = "busy"

    def __init__(self, message: str, seconds: float) -> None:
        super().__init__(message)
        self.seconds = seconds


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """Seconds, and bytes per second.

    A transfer may take `budget_seconds` plus its size at `slowest_rate`, from the connect on: a peer that drips a byte at
    a time, of its headers or its body, passes every read timeout. `fastest_rate`: how much of the network an update may
    use, None = all.
    """

    connect_seconds: float = 5.0
    read_seconds: float = 15.0
    budget_seconds: float = 30.0
    slowest_rate: float = 8_000.0
    fastest_rate: float | None = None

    def seconds(self, size: int, slowest: float | None = None) -> float:
        """What a transfer of `size` bytes may take. `slowest`: a rate of our own making, when that is even lower."""
        return self.budget_seconds + size / min(self.slowest_rate, slowest or self.slowest_rate)


@dataclass(frozen=True, slots=True)
class Route:
    """How to reach a source. `tls`: makes the context of an https connection, None = the machine's own trust. `proxy`: an HTTP
    proxy to tunnel through."""

    tls: Callable[[], ssl.SSLContext | None] | None = None
    proxy: Proxy | None = None


class Download:
    """A GET of `url`. `stop` may be called from another thread, at any time, and cuts the socket.

    It keeps no clock of its own: who runs it calls `stop` when `Limits.seconds` have passed.
    """

    def __init__(
        self,
        url: str,
        token: str | Callable[[], str | None] | None,
        limits: Limits,
        pace: Pace | None = None,
        route: Route | None = None,
    ) -> None:
        self.received = 0
        self.resumed = False
        self._url = url
        self._shared_pace = pace
        self._limits = limits
        self._headers = {"Accept-Encoding": "identity"}
        self._token = token
        self._route = route or Route()
        self._stopped = Event()
        self._why = ""
        self._lock = Lock()
        self._sockets: list[socket.socket] = []

    def stop(self, why: str = "the transfer was cancelled") -> None:
        with self._lock:
            self._why = self._why or why
            self._stopped.set()
            for connected in self._sockets:
                _shut(connected)

    def into(self, part: Part, digest: str, size: int) -> None:
        """Complete `part` so that it has `size` bytes of `digest`, continuing what is there.

        Raises Unavailable (what came stays and can be resumed), Mismatch (deleted), StoreFailed.
        """
        have = part.length()
        self.resumed = 0 < have <= size
        # A wrong start may have come from another source: a source is judged by a whole file of its own.
        for start in (have, 0) if self.resumed else (0,):
            try:
                self._complete(part, digest, size, start)
                break
            except Mismatch:
                if start == 0:
                    part.remove()
                    raise

    def read(self, limit: int) -> bytes:
        """The whole body, at most `limit` bytes. Raises Absent, Unavailable, Malformed when it is longer."""
        with self._open(0) as response:
            if response.status in _ABSENT:
                raise Absent(f"{self._url} answered {response.status}")
            if response.status != 200:
                raise _refused(self._url, response)
            data = bytearray()
            for chunk in self._body(response, limit + 1):
                data += chunk
            if len(data) > limit:
                raise Malformed(f"{self._url} has more than {limit} bytes")
            return bytes(data)

    def size(self) -> int:
        """Bytes of the file as the source says, unverified. Raises Absent, Unavailable."""
        with self._open(0, last=0) as response:
            if response.status in _ABSENT:
                raise Absent(f"{self._url} answered {response.status}")
            found = _RANGE.fullmatch(response.headers.get("Content-Range", ""))
            said = found[3] if found is not None else response.headers.get("Content-Length", "")
            if response.status in (429, 503):
                raise _refused(self._url, response)
            if response.status not in (200, 206) or not said.isdecimal() or len(said) > 18:
                raise Unavailable(f"{self._url} answered {response.status} without a size")
            return int(said)

    def _complete(self, part: Part, digest: str, size: int, start: int) -> None:
        hasher = sha256()
        if start:
            part.hash(hasher, start)
        else:
            part.restart()
        if start < size:
            with self._open(start) as response:
                at = self._first_byte(response, start, size)
                if at < start:
                    part.restart()
                    hasher = sha256()
                for chunk in self._body(response, size - at):
                    part.write(chunk)
                    hasher.update(chunk)
                    at += len(chunk)
                if at < size:
                    raise Unavailable(f"{self._url} ended after {at} of {size} bytes")
        if f"sha256:{hasher.hexdigest()}" != digest:
            raise Mismatch(f"{self._url} delivered bytes with another digest")

    def _body(self, response: urllib3.BaseHTTPResponse, most: int) -> Iterator[bytes]:
        """The body as it arrives, never more than `most` bytes of it."""
        began, done = time.monotonic(), 0
        while done < most:
            # read1: what is there now. A plain read waits for the whole chunk, and a slow drip would hold it for hours.
            at_once = CHUNK if self._shared_pace is None else self._shared_pace.chunk(CHUNK)
            chunk = response.read1(min(at_once, most - done), decode_content=False)
            if self._stopped.is_set():
                raise Unavailable(f"{self._url}: {self._why}")
            if not chunk:
                return
            done += len(chunk)
            self.received += len(chunk)
            yield chunk
            self._pace(done, len(chunk), began)

    @contextmanager
    def _open(self, start: int, last: int | None = None) -> Iterator[urllib3.BaseHTTPResponse]:
        headers = dict(self._headers)
        if start or last is not None:
            headers["Range"] = f"bytes={start}-{'' if last is None else last}"
        bearer = self._bearer()
        if bearer is not None:
            headers["Authorization"] = f"Bearer {bearer}"
        timeout = urllib3.Timeout(connect=self._limits.connect_seconds, read=self._limits.read_seconds)
        try:
            with _pool(self._url, timeout, self._connected, self._route) as pool:
                target = parse_url(self._url).request_uri
                response = pool.request("GET", target, headers=headers, redirect=False, preload_content=False)
                try:
                    yield response
                finally:
                    response.close()
        except (urllib3.exceptions.HTTPError, OSError, ValueError) as error:
            raise Unavailable(f"{self._url}: {self._why or error}") from error
        finally:
            self._disconnected()

    def _bearer(self) -> str | None:
        try:
            return self._token() if callable(self._token) else self._token
        except SyncError as error:
            raise Unavailable(f"{self._url}: {error}") from error

    def _connected(self, connected: socket.socket) -> None:
        # A descriptor of our own: TLS takes the first one over, and this one can be shut while headers are still read.
        copy = connected.dup()
        with self._lock:
            self._sockets.append(copy)
            if self._stopped.is_set():
                _shut(copy)

    def _disconnected(self) -> None:
        with self._lock:
            while self._sockets:
                self._sockets.pop().close()

    def _first_byte(self, response: urllib3.BaseHTTPResponse, start: int, size: int) -> int:
        """Where the body begins: `start`, or 0 from a server that ignores ranges. Checks every length it announces."""
        if response.status == 206:
            found = _RANGE.fullmatch(response.headers.get("Content-Range", ""))
            if found is None or int(found[1]) != start:
                raise Unavailable(f"{self._url} answered another range than the one asked for")
            if int(found[3]) != size:
                raise Mismatch(f"{self._url} has {found[3]} bytes, {size} were signed for")
            return start
        if response.status == 416:
            raise Mismatch(f"{self._url} has no byte {start} of {size}")
        if response.status != 200:
            raise _refused(self._url, response)
        length = response.headers.get("Content-Length")
        if length is not None and length != str(size):
            raise Mismatch(f"{self._url} has {length[:20]} bytes, {size} were signed for")
        return 0

    def _pace(self, done: int, latest: int, began: float) -> None:
        wait = self._shared_pace.take(latest) if self._shared_pace is not None else 0.0
        if wait > 0:
            self._stopped.wait(wait)
        if self._limits.fastest_rate is not None:
            self._stopped.wait(max(0.0, began + done / self._limits.fastest_rate - time.monotonic()))


def _refused(url: str, response: urllib3.BaseHTTPResponse) -> Unavailable:
    said = response.headers.get("Retry-After", "")
    if response.status in (429, 503) and said.isdecimal() and len(said) < 10:
        return Busy(f"{url} is busy ({response.status})", min(int(said), MAX_RETRY_SECONDS))
    return Unavailable(f"{url} answered {response.status}")


class _Plain(HTTPConnection):
    """Shows its socket to `watch` as soon as it is connected."""

    def __init__(
        self, *args: Any, watch: Callable[[socket.socket], None], through: Proxy | None = None, **options: Any
    ) -> None:
        super().__init__(*args, **options)
        self._watch = watch
        self._through = through

    def _new_conn(self) -> socket.socket:
        connected = super()._new_conn() if self._through is None else _tunnelled(self, self._through)
        self._watch(connected)
        return connected


class _Secure(HTTPSConnection):
    """The same, before the handshake."""

    def __init__(
        self, *args: Any, watch: Callable[[socket.socket], None], through: Proxy | None = None, **options: Any
    ) -> None:
        super().__init__(*args, **options)
        self._watch = watch
        self._through = through

    def _new_conn(self) -> socket.socket:
        connected = super()._new_conn() if self._through is None else _tunnelled(self, self._through)
        self._watch(connected)
        return connected


class _PlainPool(urllib3.HTTPConnectionPool):
    ConnectionCls = _Plain


class _SecurePool(urllib3.HTTPSConnectionPool):
    ConnectionCls = _Secure


def _tunnelled(connection: HTTPConnection, proxy: Proxy) -> socket.socket:
    timeout = connection.timeout if isinstance(connection.timeout, int | float) else Limits().connect_seconds
    return tunnel.connect(proxy, connection.host.strip("[]"), connection.port, timeout)


def _pool(
    url: str, timeout: urllib3.Timeout, watch: Callable[[socket.socket], None], route: Route
) -> urllib3.HTTPConnectionPool:
    parts = parse_url(url)
    if parts.host is None or parts.scheme not in ("http", "https"):
        raise ValueError("not an http or https address")
    options: dict[str, Any] = {
        "timeout": timeout,
        "maxsize": 1,
        "retries": False,
        "watch": watch,
        "through": route.proxy,
    }
    if parts.scheme == "http":
        return _PlainPool(parts.host, parts.port, **options)
    context = route.tls() if route.tls is not None else None
    return _SecurePool(parts.host, parts.port, ssl_context=context, **options)


def _shut(connected: socket.socket) -> None:
    try:
        connected.shutdown(socket.SHUT_RDWR)
    except OSError:
        return  # it ended by itself meanwhile
