"""What a program on this machine may say to the node: do not activate an update now; and ask how its updates stand.

    POST /control/hold     {"reason": "robot in motion", "seconds": 60}  ->  {"id": ..., "seconds": 60.0}
    POST /control/release  {"id": ...}                                   ->  {"released": true}
    GET  /control/updates                                                ->  {"documents": {...}, "holds": [...]}

Only for programs on the same machine, whatever else the data plane listens on: whoever may hold may put off a fix.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TypeVar

import msgspec

from models.errors import Forbidden, InvalidRequest, NotFound
from models.serving.exchange import JSON, Handler, HttpRequest, HttpResponse
from sync.clock import Clock, SystemClock
from sync.errors import Malformed, StoreFailed
from sync.member import Member

MAX_BODY = 4_096

T = TypeVar("T")


class HoldIn(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """`seconds`: None = as long as the settings allow."""

    reason: str
    seconds: float | None = None


class ReleaseIn(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    id: str


class LocalControl:
    """HTTP handlers below `/control`."""

    def __init__(self, member: Member, clock: Clock | None = None) -> None:
        self._member = member
        self._clock = clock or SystemClock()

    @property
    def routes(self) -> Mapping[str, Handler]:
        """Path prefix -> handler, as `RestHandler` takes them."""
        return {"/control": self.handle}

    async def handle(self, request: HttpRequest) -> HttpResponse:
        """Raises Forbidden for other machines, NotFound, InvalidRequest naming the field."""
        if not request.peer.is_local:
            raise Forbidden("/control is for programs on the same machine")
        match request.method, request.path:
            case "POST", "/control/hold":
                return await self._hold(_decode(request.body, HoldIn))
            case "POST", "/control/release":
                return await self._release(_decode(request.body, ReleaseIn))
            case "GET", "/control/updates":
                return self._updates()
        raise NotFound(f"nothing answers {request.method} {request.path[:100]}")

    async def _hold(self, asked: HoldIn) -> HttpResponse:
        holds = self._member.holds
        try:
            made = holds.hold(asked.reason, asked.seconds)
        except Malformed as error:
            raise InvalidRequest(str(error)) from error
        try:
            await holds.keep(made)
        except StoreFailed:
            pass  # it holds now; only a restart of the node would end it early
        # From the answer on nothing is activated.
        await self._member.settled()
        return _answer({"id": made.id, "seconds": max(0.0, made.until - self._clock.monotonic())})

    async def _release(self, asked: ReleaseIn) -> HttpResponse:
        released = self._member.holds.release(asked.id)
        await self._member.holds.forget(asked.id)
        return _answer({"released": released})

    def _updates(self) -> HttpResponse:
        now = self._clock.monotonic()
        holds = [
            {"id": hold.id, "reason": hold.reason, "seconds": hold.until - now} for hold in self._member.holds.all()
        ]
        reports = {kind: updater.report for kind, updater in self._member.updaters.items()}
        return _answer({"documents": reports, "holds": holds})


def _decode(body: bytes, into: type[T]) -> T:
    if len(body) > MAX_BODY:
        raise InvalidRequest(f"the body has {len(body)} bytes, at most {MAX_BODY} are accepted")
    try:
        return msgspec.json.decode(body, type=into)
    except (msgspec.MsgspecError, UnicodeDecodeError) as error:
        raise InvalidRequest(f"body: {error}") from error


def _answer(value: object) -> HttpResponse:
    return HttpResponse(200, JSON, msgspec.json.encode(value))
