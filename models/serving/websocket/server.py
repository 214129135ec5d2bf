"""`GET /v2/ws`: the handler that turns an HTTP connection into a WebSocket session, and what all sessions share."""

from __future__ import annotations

import asyncio
import http
import time
from collections.abc import Callable, Collection
from typing import TYPE_CHECKING

from models.errors import Forbidden, MethodNotAllowed, NotReady
from models.serving.codec import Heads
from models.serving.exchange import JSON, HttpRequest, HttpResponse, Upgrade, error_body, header_lines
from models.serving.plane import DataPlane
from models.serving.websocket.limits import WebSocketLimits

if TYPE_CHECKING:
    from models.serving.websocket.session import Session
    from models.serving.websocket.subscriptions import JobFeed

SWEEP_SECONDS = 1.0


class WebSockets:
    """A handler for one path. `origins`: of pages whose scripts may connect, as browsers send them ("https://example.org").

    A browser connects for any page with its user's own rights: without an origin from the list it is refused. Clients that
    are no browsers send none. `jobs` None = no jobs are kept here. `clock`: monotonic seconds.
    """

    def __init__(
        self,
        plane: DataPlane,
        *,
        origins: Collection[str] = (),
        jobs: JobFeed | None = None,
        limits: WebSocketLimits = WebSocketLimits(),  # noqa: B008 - frozen
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.plane = plane
        self.limits = limits
        self.jobs = jobs
        self.clock = clock
        self.heads: Heads = {}
        self.sessions: set[Session] = set()
        self._origins = frozenset(origin.encode("latin-1") for origin in origins)
        self._draining = False
        self._empty = asyncio.Event()
        self._timer: asyncio.TimerHandle | None = None
        self._unwatch: Callable[[], None] | None = None

    @property
    def connections(self) -> int:
        """Sessions now."""
        return len(self.sessions)

    async def __call__(self, request: HttpRequest) -> HttpResponse:
        """Answer a handshake. Raises Forbidden, MethodNotAllowed, NotReady, Unauthenticated."""
        if request.method != "GET":
            raise MethodNotAllowed(f"{request.path} takes GET, not {request.method}")
        headers = request.headers
        origin = headers.get(b"origin")
        if origin is not None and origin not in self._origins:
            raise Forbidden(f"pages of {origin.decode('latin-1')!r} may not connect here")
        revision = self.plane.access.revision
        authorization = headers.get(b"authorization")
        caller = self.plane.access.identify(request.peer, authorization)
        if self._draining or len(self.sessions) >= self.limits.connections:
            raise NotReady("this server takes no more WebSocket sessions now")
        # Imported by the first handshake, or beside serving: no other answer should wait for it.
        from models.serving.websocket.frames import handshake
        from models.serving.websocket.session import Session

        status, answer, reason = handshake(request.path, headers)
        if status != http.HTTPStatus.SWITCHING_PROTOCOLS:
            return HttpResponse(status, JSON + header_lines(answer), error_body(reason))

        def start() -> Session:
            return Session(self, request.peer, authorization, caller, revision)

        return HttpResponse(status, header_lines(answer), Upgrade(start))

    def sweep(self) -> None:
        """One second has passed: ping, cut off, end what is no longer allowed, tell of changes nobody called for."""
        for session in tuple(self.sessions):
            session.check_time()
            session.check_caller()
            if self._unwatch is None:
                session.tell_versions()

    def watch(self) -> None:
        """Have news of models pushed from now on. Without a control they are noticed by the sweep."""
        control = self.plane.control
        if control is not None and self._unwatch is None:
            self._unwatch = control.watch(self._changed)

    def enter(self, session: Session) -> None:
        self.sessions.add(session)
        self._sweep_later()
        if self._draining:
            session.drain()

    def forget(self, session: Session) -> None:
        self.sessions.discard(session)
        if self._draining and not self.sessions:
            self._empty.set()

    async def close(self, seconds: float = 5.0) -> None:
        """Refuse new sessions and requests, answer those taken for up to `seconds`, then end every session."""
        self._draining = True
        for session in tuple(self.sessions):
            session.drain()
        if self.sessions:
            await asyncio.wait((asyncio.ensure_future(self._empty.wait()),), timeout=seconds)
        for session in tuple(self.sessions):
            session.abort()
        if self._timer is not None:
            self._timer.cancel()
        if self._unwatch is not None:
            self._unwatch()

    def _changed(self, model: str) -> None:
        for session in tuple(self.sessions):
            session.tell_versions(model)

    def _sweep_later(self) -> None:
        if self._timer is None:
            self._timer = asyncio.get_running_loop().call_later(SWEEP_SECONDS, self._tick)

    def _tick(self) -> None:
        self._timer = None
        self.sweep()
        if self.sessions:
            self._sweep_later()
