"""One transfer over HTTP, in the calling thread. The only importer of urllib3."""

from __future__ import annotations

import re
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from threading import Event
from typing import BinaryIO, Protocol

import urllib3

from sync.errors import DigestMismatch, Malformed, StoreFailed, Unavailable

CHUNK = 256 * 1024
_RANGE = re.compile(r"bytes (\d+)-(\d+)/(\d+)")


class _Hash(Protocol):
    def update(self, data: bytes, /) -> None: ...


class Mismatch(DigestMismatch):
    """A source delivered, from the first byte on, something else than was signed for: it is of no use for this file."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """Seconds, and bytes per second.

    A transfer may take `budget_seconds` plus its size at `slowest_rate`: a peer that drips a byte at a time passes every
    read timeout. `fastest_rate`: how much of the network an update may use, None = all.
    """

    connect_seconds: float = 5.0
    read_seconds: float = 15.0
    budget_seconds: float = 30.0
    slowest_rate: float = 8_000.0
    fastest_rate: float | None = None


class Download:
    """A GET of `url`. `stop` may be called from another thread and cuts the socket."""

    def __init__(self, url: str, token: str | None, limits: Limits) -> None:
        self._url = url
        self._limits = limits
        self._headers = {"Accept-Encoding": "identity"}
        if token is not None:
            self._headers["Authorization"] = f"Bearer {token}"
        self._stopped = Event()
        self._response: urllib3.BaseHTTPResponse | None = None

    def stop(self) -> None:
        self._stopped.set()
        response = self._response
        if response is not None:
            try:
                response.shutdown()
            except (ValueError, OSError):
                return  # it ended by itself meanwhile

    def into(self, staged: Path, digest: str, size: int) -> None:
        """Complete `staged` so that it has `size` bytes of `digest`, continuing what is there.

        Raises Unavailable (what came stays and can be resumed), Mismatch (deleted), StoreFailed.
        """
        have = _length(staged)
        # A wrong start may have come from another source: a source is judged by a whole file of its own.
        for start in (have, 0) if 0 < have <= size else (0,):
            try:
                self._complete(staged, digest, size, start)
                break
            except Mismatch:
                _remove(staged)
                if start == 0:
                    raise

    def read(self, limit: int) -> bytes:
        """The whole body, at most `limit` bytes. Raises Unavailable, Malformed when it is longer."""
        with self._open(0) as response:
            if response.status != 200:
                raise Unavailable(f"{self._url} answered {response.status}")
            data = bytearray()
            for chunk in self._body(response, limit + 1):
                data += chunk
            if len(data) > limit:
                raise Malformed(f"{self._url} has more than {limit} bytes")
            return bytes(data)

    def _complete(self, staged: Path, digest: str, size: int, start: int) -> None:
        hasher = sha256()
        with _opened(staged, start) as file:
            _hash(file, hasher, start)
            if start < size:
                with self._open(start) as response:
                    at = self._first_byte(response, start, size)
                    if at < start:
                        _restart(file)
                        hasher = sha256()
                    for chunk in self._body(response, size - at):
                        _write(file, chunk)
                        hasher.update(chunk)
                        at += len(chunk)
                    if at < size:
                        raise Unavailable(f"{self._url} ended after {at} of {size} bytes")
        if f"sha256:{hasher.hexdigest()}" != digest:
            raise Mismatch(f"{self._url} delivered bytes with another digest")

    def _body(self, response: urllib3.BaseHTTPResponse, most: int) -> Iterator[bytes]:
        """The body as it arrives, never more than `most` bytes of it."""
        began, done = time.monotonic(), 0
        deadline = began + self._limits.budget_seconds + most / self._limits.slowest_rate
        while done < most:
            if self._stopped.is_set():
                raise Unavailable("the transfer was cancelled")
            if time.monotonic() > deadline:
                raise Unavailable(f"{self._url} is too slow: {done} bytes within the budget")
            # read1: what is there now. A plain read waits for the whole chunk, and a slow drip would hold it for hours.
            chunk = response.read1(min(CHUNK, most - done), decode_content=False)
            if not chunk:
                return
            done += len(chunk)
            yield chunk
            self._pace(done, began)

    @contextmanager
    def _open(self, start: int) -> Iterator[urllib3.BaseHTTPResponse]:
        headers = {**self._headers, "Range": f"bytes={start}-"} if start else self._headers
        timeout = urllib3.Timeout(connect=self._limits.connect_seconds, read=self._limits.read_seconds)
        with urllib3.PoolManager(num_pools=1, timeout=timeout, retries=False) as pool:
            try:
                response = pool.request("GET", self._url, headers=headers, redirect=False, preload_content=False)
                self._response = response
                try:
                    yield response
                finally:
                    self._response = None
                    response.close()
            except (urllib3.exceptions.HTTPError, OSError, ValueError) as error:
                raise Unavailable(f"{self._url}: {error}") from error

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
            raise Unavailable(f"{self._url} answered {response.status}")
        length = response.headers.get("Content-Length")
        if length is not None and length != str(size):
            raise Mismatch(f"{self._url} has {length[:20]} bytes, {size} were signed for")
        return 0

    def _pace(self, done: int, began: float) -> None:
        if self._limits.fastest_rate is not None:
            self._stopped.wait(max(0.0, began + done / self._limits.fastest_rate - time.monotonic()))


def _length(staged: Path) -> int:
    with _disk(staged):
        return staged.stat().st_size if staged.exists() else 0


def _remove(staged: Path) -> None:
    with _disk(staged):
        staged.unlink(missing_ok=True)


def _opened(staged: Path, start: int) -> BinaryIO:
    """Unbuffered, so that a full disk shows at the write and not at the close."""
    with _disk(staged):
        return staged.open("r+b" if start else "wb", buffering=0)


def _hash(file: BinaryIO, hasher: _Hash, length: int) -> None:
    with _disk(file.name):
        while length and (block := file.read(min(CHUNK, length))):
            hasher.update(block)
            length -= len(block)


def _restart(file: BinaryIO) -> None:
    with _disk(file.name):
        file.seek(0)
        file.truncate()


def _write(file: BinaryIO, chunk: bytes) -> None:
    with _disk(file.name):
        view = memoryview(chunk)
        while view:
            view = view[file.write(view) :]


@contextmanager
def _disk(what: object) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise StoreFailed(f"could not write {what}: {error}") from error
