"""The gate in front of the API: nobody is heard before it is known who speaks, and nothing is read without a bound.

Plain ASGI around the whole application, because a framework's dependency would run after the body was read and only on
routes that exist.
"""

from __future__ import annotations

import asyncio
import logging
from collections import Counter
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

import msgspec

from cloud_hub.auth import IDENTITY_PATHS, Principal, Tokens, roles_for
from cloud_hub.errors import Forbidden
from models.errors import InvalidRequest, TierlineError, TooLarge, TryAgain, Unauthenticated
from sync.errors import Refused, SyncError

MAX_BODY_BYTES = 1024 * 1024
"""Largest body of anything but a blob: manifests and policies are a quarter of it at most."""
BODY_SECONDS = 30.0
"""How long a body of that size may take to arrive, and how long a blob's next piece may."""
OPEN_BODY_SECONDS = 10.0
MAX_OPEN_BODIES = 16
"""How long a body from somebody unknown may take, and how many may be on their way from one address: whoever sends slowly must
not keep others from renewing."""
MAX_OPEN_BODY_BYTES = 16 * 1024
"""Largest body from somebody unknown: a certificate request and a token."""
MAX_OPEN_CALLS = 64
"""Such calls under way at once: each costs the hub a signature and a commit."""
STREAMED = "/api/v1/blobs/"

Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
Application = Callable[[Scope, Receive, Send], Awaitable[None]]

log = logging.getLogger(__name__)


class Gate:
    """Answers 401 or 403 by itself; otherwise the principal is in `scope["state"]["principal"]`."""

    def __init__(self, application: Application, tokens: Tokens) -> None:
        self._application = application
        self._tokens = tokens
        self._open_calls = 0
        self._open_bodies: Counter[str] = Counter()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._application(scope, receive, send)
            return
        stranger = scope["path"] in IDENTITY_PATHS
        try:
            scope.setdefault("state", {})["principal"] = await self._admit(scope)
            if stranger:
                receive = await self._hear_stranger(scope, receive)
            elif not scope["path"].startswith(STREAMED):
                receive = _replay(await _read_body(receive, MAX_BODY_BYTES, BODY_SECONDS), receive)
        except TierlineError as error:
            await refuse(send, error)
            return
        except Exception:
            log.exception("the gate failed")
            await refuse(send, TierlineError("internal error"))
            return
        self._open_calls += stranger
        try:
            await self._application(scope, receive, send)
        finally:
            self._open_calls -= stranger

    async def _hear_stranger(self, scope: Scope, receive: Receive) -> Receive:
        """The body first, and only then a place among those who cost the hub something."""
        address = str((scope.get("client") or ("",))[0])
        if self._open_bodies[address] >= MAX_OPEN_BODIES:
            raise TryAgain("too many requests are on their way from this address")
        self._open_bodies[address] += 1
        try:
            receive = _replay(await _read_body(receive, MAX_OPEN_BODY_BYTES, OPEN_BODY_SECONDS), receive)
        finally:
            self._open_bodies[address] -= 1
            if not self._open_bodies[address]:
                del self._open_bodies[address]
        if self._open_calls >= MAX_OPEN_CALLS:
            raise TryAgain("too many nodes enrol or renew at this moment")
        return receive

    async def _admit(self, scope: Scope) -> Principal | None:
        roles = roles_for(scope["path"])
        if not roles:
            return None
        token = _bearer(scope)
        if token is None:
            raise Unauthenticated("this route needs 'Authorization: Bearer <token>'")
        principal = await asyncio.to_thread(self._tokens.recognise, token)
        if principal is None:
            raise Unauthenticated("the token is not known here")
        if principal.role not in roles:
            raise Forbidden(f"a {principal.role} token does not reach this route")
        return principal


def status_of(error: Exception) -> int:
    """The HTTP status of an error of either tree."""
    if isinstance(error, TierlineError):
        return error.http
    if isinstance(error, Refused):
        return InvalidRequest.http
    return 503 if isinstance(error, SyncError) else 500


async def refuse(send: Send, error: Exception) -> None:
    headers = [(b"content-type", b"application/json"), (b"connection", b"close")]
    if isinstance(error, Unauthenticated):
        headers.append((b"www-authenticate", b"Bearer"))
    await send({"type": "http.response.start", "status": status_of(error), "headers": headers})
    await send({"type": "http.response.body", "body": msgspec.json.encode({"error": str(error)})})


async def next_piece(receive: Receive) -> Message:
    """The next event of a request's body. Raises InvalidRequest when none comes in time."""
    try:
        async with asyncio.timeout(BODY_SECONDS):
            return await receive()
    except TimeoutError as error:
        raise InvalidRequest(f"the body did not arrive within {BODY_SECONDS:g} s") from error


def _bearer(scope: Scope) -> str | None:
    for name, value in scope["headers"]:
        if name == b"authorization":
            scheme, _, token = value.decode("latin-1").partition(" ")
            return token.strip() if scheme.lower() == "bearer" and token else None
    return None


async def _read_body(receive: Receive, limit: int, seconds: float) -> list[Message]:
    """The whole body as the events it came in. Raises TooLarge, or InvalidRequest when it is slow."""
    events: list[Message] = []
    size = 0
    try:
        async with asyncio.timeout(seconds):
            while not events or events[-1].get("more_body", False):
                events.append(await receive())
                size += len(events[-1].get("body", b""))
                if size > limit:
                    raise TooLarge(f"the body has more than {limit} bytes")
    except TimeoutError as error:
        raise InvalidRequest(f"the body did not arrive within {seconds:g} s") from error
    return events


def _replay(events: list[Message], receive: Receive) -> Receive:
    """The events read already, then whatever comes: a response that streams waits there for the client to leave."""
    waiting = iter(events)

    async def replayed() -> Message:
        event = next(waiting, None)
        return event if event is not None else await receive()

    return replayed
