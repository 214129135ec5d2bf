"""A source of files and documents over HTTP that lies, breaks, drips and redirects as it is told."""

from __future__ import annotations

import re
import threading
from collections import Counter, deque
from collections.abc import Callable, Mapping
from hashlib import sha256
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import TracebackType
from typing import Any, Self

from sync.chaos.faults import NeverFired

FILES = "/blobs/"
DRIP_SECONDS = 0.05
ENDLESS_CHUNK = 64 * 1024
MAX_ENDLESS = 1 << 30
"""Where an endless body ends all the same: a client that reads on must not keep the test for ever."""
SILENT_SECONDS = 60.0
RETRY_AFTER = 1
_RANGE = re.compile(r"bytes=(\d{1,19})-(\d{0,19})")


class MisbehavingSource:
    """`with MisbehavingSource() as source:` serves `source.url` on loopback, in threads of its own.

    `add` gives it a file, `put` a document at a path. `misbehave(prefix, how)` decides about the next requests whose path
    begins so; `requests` are (path, Range header or None, how it was treated). What a way does: `WAYS`.
    """

    def __init__(self) -> None:
        self.requests: list[tuple[str, str | None, str]] = []
        self.fired: Counter[str] = Counter()
        self.elsewhere = "http://127.0.0.1:9/"
        """Where a redirect points to."""
        self._paths: dict[str, bytes | Callable[[], bytes]] = {}
        self._plans: dict[str, deque[str]] = {}
        self._stopped = threading.Event()
        self._lock = threading.Lock()
        source = self

        class Handler(_Handler):
            state = source

        self._http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._http.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._http.server_port}"
        self._thread = threading.Thread(target=self._http.serve_forever, args=(0.02,), name="source", daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._stopped.set()
        self._http.shutdown()
        self._http.server_close()

    def add(self, data: bytes) -> str:
        """Serve a file. Its digest."""
        digest = f"sha256:{sha256(data).hexdigest()}"
        self._paths[FILES + digest] = data
        return digest

    def put(self, path: str, data: bytes | Callable[[], bytes]) -> None:
        """Serve bytes at a path; a callable is asked at every request, in a thread of the server."""
        self._paths[path] = data

    def put_all(self, paths: Mapping[str, bytes]) -> None:
        self._paths.update(paths)

    def misbehave(self, prefix: str, how: str, times: int | None = 1) -> None:
        """Treat the next `times` requests (None = all) for paths that begin with `prefix` as `how`. Raises ValueError."""
        if how not in WAYS:
            raise ValueError(f"no way {how!r}; there are {', '.join(sorted(WAYS))}")
        with self._lock:
            if times is None:
                self._plans[prefix] = deque([how], maxlen=1)
            else:
                self._plans.setdefault(prefix, deque()).extend([how] * times)

    def behave(self) -> None:
        """Be honest from now on."""
        with self._lock:
            self._plans.clear()

    def insist(self, how: str) -> None:
        """Raises NeverFired unless a request met this treatment."""
        if not self.fired[how]:
            raise NeverFired(f"{how}: no request met it")

    @property
    def stopped(self) -> threading.Event:
        return self._stopped

    def content(self, path: str) -> bytes | None:
        found = self._paths.get(path)
        return found() if callable(found) else found

    def treatment(self, path: str, asked: str | None) -> str:
        """How this request is treated; noted."""
        with self._lock:
            how = "honest"
            for prefix, plan in self._plans.items():
                if path.startswith(prefix) and plan:
                    how = plan[0] if plan.maxlen == 1 else plan.popleft()
                    break
            self.requests.append((path, asked, how))
            self.fired[how] += 1
            return how


class _Handler(BaseHTTPRequestHandler):
    state: MisbehavingSource
    timeout = SILENT_SECONDS

    def do_GET(self) -> None:
        asked = self.headers.get("Range")
        how = self.state.treatment(self.path, asked)
        data = self.state.content(self.path)
        try:
            if data is None:
                self.head(404, Content_Length=0)
            else:
                WAYS[how](self, data)
        except OSError:
            self.close_connection = True  # the client had enough

    def log_message(self, *args: Any) -> None:
        """Silent."""

    def head(self, status: int, **headers: object) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), str(value))
        self.end_headers()

    def start_of(self, data: bytes) -> int:
        """The first byte asked for."""
        found = _RANGE.fullmatch(self.headers.get("Range") or "")
        return min(int(found[1]), len(data)) if found else 0

    def right_head(self, data: bytes) -> int:
        """The head an honest server sends; where the body begins."""
        start = self.start_of(data)
        if start:
            whole = len(data)
            self.head(206, Content_Length=whole - start, Content_Range=f"bytes {start}-{whole - 1}/{whole}")
        else:
            self.head(200, Content_Length=len(data))
        return start


def _honest(request: _Handler, data: bytes) -> None:
    request.wfile.write(data[request.right_head(data) :])


def _truncated(request: _Handler, data: bytes) -> None:
    start = request.right_head(data)
    request.wfile.write(data[start : start + (len(data) - start) // 2])


def _endless(request: _Handler, data: bytes) -> None:
    request.head(200)
    for _ in range(MAX_ENDLESS // ENDLESS_CHUNK):
        if request.state.stopped.is_set():
            return
        request.wfile.write(b"x" * ENDLESS_CHUNK)


def _dripping(request: _Handler, data: bytes) -> None:
    for byte in data[request.right_head(data) :]:
        if request.state.stopped.wait(DRIP_SECONDS):
            return
        request.wfile.write(bytes([byte]))


def _longer(request: _Handler, data: bytes) -> None:
    request.head(200, Content_Length=len(data) + 1)
    request.wfile.write(data + b"x")


def _wrong(request: _Handler, data: bytes) -> None:
    """The right length, other bytes."""
    request.head(200, Content_Length=len(data))
    request.wfile.write(bytes(byte ^ 0xFF for byte in data))


def _unavailable(request: _Handler, data: bytes) -> None:
    request.head(503, Content_Length=0, Retry_After=RETRY_AFTER)


def _missing(request: _Handler, data: bytes) -> None:
    request.head(404, Content_Length=0)


def _redirect(request: _Handler, data: bytes) -> None:
    request.head(302, Location=request.state.elsewhere, Content_Length=0)


def _silent(request: _Handler, data: bytes) -> None:
    """The head, and nothing after it."""
    request.head(200, Content_Length=len(data))
    request.state.stopped.wait(SILENT_SECONDS)


def _mute(request: _Handler, data: bytes) -> None:
    """Not even a head."""
    request.state.stopped.wait(SILENT_SECONDS)


def _rangeless(request: _Handler, data: bytes) -> None:
    request.head(200, Content_Length=len(data))
    request.wfile.write(data)


def _shifted(request: _Handler, data: bytes) -> None:
    """Another range than the one asked for."""
    request.head(206, Content_Length=len(data), Content_Range=f"bytes 0-{len(data) - 1}/{len(data)}")
    request.wfile.write(data)


def _garbage(request: _Handler, data: bytes) -> None:
    request.wfile.write(b"\0\1\2 this is not HTTP\r\n\r\n")


WAYS: dict[str, Callable[[_Handler, bytes], None]] = {
    "honest": _honest,
    "truncated": _truncated,
    "endless": _endless,
    "dripping": _dripping,
    "longer": _longer,
    "wrong": _wrong,
    "unavailable": _unavailable,
    "missing": _missing,
    "redirect": _redirect,
    "silent": _silent,
    "mute": _mute,
    "rangeless": _rangeless,
    "shifted": _shifted,
    "garbage": _garbage,
}
