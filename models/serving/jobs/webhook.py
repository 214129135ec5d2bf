"""Tells a caller's server that a job has ended: a POST of its status, signed, tried again until it is taken.

A caller chooses the URL, so this server must not become their hand inside its network: only origins on the operator's list
are called, redirects are not followed, and the answer is read no further than its status. Nothing listed = no webhooks.

Signature: `tierline-signature: t=<seconds>,v1=<hex>`, HMAC-SHA256 (RFC 2104) with the shared secret over `<seconds>.<body>`.
"""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import logging
import random
import re
import ssl
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from urllib.parse import urlsplit

import msgspec

from models.errors import Forbidden, InvalidRequest
from models.serving.jobs.job import Job, status_of

log = logging.getLogger("tierline.jobs.webhook")

MAX_URL = 2048
TIMEOUT_SECONDS = 10.0
"""For one whole try: connecting, sending and the status."""
MAX_TRIES = 8
FIRST_PAUSE_SECONDS = 2.0
MAX_PAUSE_SECONDS = 600.0
MAX_HEADS = 4
"""Interim answers (1xx) that are skipped."""
_STATUS = re.compile(rb"HTTP/1\.[01] ([1-5][0-9]{2})[ \r]")
_URL = re.compile(r"[\x21-\x7e]+")
_PORTS = {"http": 80, "https": 443}
_TRY_AGAIN = frozenset((408, 425, 429))


class Target(msgspec.Struct, frozen=True):
    """A URL taken apart. `path` includes the query."""

    scheme: str
    host: str
    port: int
    path: str

    @property
    def authority(self) -> str:
        host = f"[{self.host}]" if ":" in self.host else self.host
        return host if self.port == _PORTS[self.scheme] else f"{host}:{self.port}"


def parse_target(url: str) -> Target:
    """Raises InvalidRequest for anything but http or https with a host, no credentials, no fragment, no dot segments."""
    if len(url) > MAX_URL or not _URL.fullmatch(url) or "\\" in url:
        raise InvalidRequest(f"tierline-webhook is not a URL of at most {MAX_URL} printable characters")
    try:
        parts = urlsplit(url)
        port = parts.port
    except ValueError as error:
        raise InvalidRequest(f"tierline-webhook is not a URL: {error}") from error
    if parts.scheme not in _PORTS or not parts.hostname:
        raise InvalidRequest("tierline-webhook is not an http:// or https:// URL")
    if "@" in parts.netloc or "#" in url:
        raise InvalidRequest("tierline-webhook holds credentials or a fragment")
    path = parts.path or "/"
    # What a server makes of these is its own affair: a listed path could be left through them.
    if any(segment in (".", "..") for segment in path.lower().replace("%2e", ".").replace("%2f", "/").split("/")):
        raise InvalidRequest("tierline-webhook has a dot segment in its path")
    query = f"?{parts.query}" if parts.query else ""
    return Target(parts.scheme, parts.hostname.rstrip("."), port or _PORTS[parts.scheme], path + query)


class Webhooks:
    """`allowed`: origins, each with an optional path below which everything is allowed: `https://hooks.example.com/jobs`.

    `secret`: signs what is sent, None = nothing is signed. Raises InvalidRequest for an entry that is no such URL.
    """

    def __init__(
        self,
        allowed: Sequence[str] = (),
        *,
        secret: bytes | None = None,
        timeout: float = TIMEOUT_SECONDS,
        clock: Callable[[], float] = time.time,
        uniform: Callable[[float, float], float] = random.uniform,
        tls: ssl.SSLContext | None = None,
    ) -> None:
        self._allowed = [parse_target(entry) for entry in allowed]
        self._secret = secret
        self._timeout = timeout
        self._clock = clock
        self._uniform = uniform
        self._tls = tls

    def check(self, url: str) -> None:
        """Raises Forbidden unless `url` is on the list, InvalidRequest when it is no URL."""
        target = parse_target(url)
        if not self._allowed:
            raise Forbidden("webhooks are not allowed here: no target is configured")
        if not any(_covers(entry, target) for entry in self._allowed):
            raise Forbidden(f"webhooks to {target.scheme}://{target.authority} are not allowed here")

    async def deliver(self, job: Job) -> float | None:
        """One try. Returns when the next is due (seconds of the epoch), None when it was taken or is given up."""
        assert job.webhook is not None
        try:
            self.check(job.webhook)  # again: the list may have changed since
            async with asyncio.timeout(self._timeout):
                status = await self._post(parse_target(job.webhook), job)
        except (OSError, EOFError, TimeoutError, asyncio.LimitOverrunError, ssl.SSLError, ValueError) as error:
            return self._next(job, str(error) or type(error).__name__)
        except (Forbidden, InvalidRequest) as error:
            log.warning("the webhook of job %s is given up: %s", job.id, error)
            return None
        if 200 <= status < 300:
            return None
        if status >= 500 or status in _TRY_AGAIN:
            return self._next(job, f"status {status}")
        log.warning("the webhook of job %s is given up: status %d", job.id, status)
        return None

    def _next(self, job: Job, reason: str) -> float | None:
        pause = min(FIRST_PAUSE_SECONDS * 2.0**job.hook_tries, MAX_PAUSE_SECONDS) * self._uniform(0.5, 1.0)
        due = self._clock() + pause
        if job.hook_tries >= MAX_TRIES or due >= job.expires:
            log.warning("the webhook of job %s is given up after %d tries: %s", job.id, job.hook_tries, reason)
            return None
        return due

    def _request(self, target: Target, job: Job) -> bytes:
        body = msgspec.json.encode(status_of(job))
        lines = [
            f"POST {target.path} HTTP/1.1",
            f"host: {target.authority}",
            "content-type: application/json",
            f"content-length: {len(body)}",
            f"tierline-job: {job.id}",
            "connection: close",
        ]
        if self._secret is not None:
            lines.append(f"tierline-signature: {sign(self._secret, int(self._clock()), body)}")
        return "\r\n".join([*lines, "", ""]).encode("ascii") + body

    async def _post(self, target: Target, job: Job) -> int:
        tls = None
        if target.scheme == "https":
            self._tls = tls = self._tls or ssl.create_default_context()
        reader, writer = await asyncio.open_connection(target.host, target.port, ssl=tls)
        try:
            writer.write(self._request(target, job))
            await writer.drain()
            for _ in range(MAX_HEADS):
                found = _STATUS.match(await reader.readuntil(b"\r\n\r\n"))
                if found is None:
                    break
                if not found[1].startswith(b"1"):
                    return int(found[1])
            raise ValueError("the answer is not HTTP")
        finally:
            writer.close()
            with suppress(OSError):
                writer.transport.abort()


def sign(secret: bytes, seconds: int, body: bytes) -> str:
    """The value of `tierline-signature`, as a receiver computes it to compare."""
    mac = hmac.new(secret, b"%d." % seconds + body, hashlib.sha256)
    return f"t={seconds},v1={mac.hexdigest()}"


def _covers(entry: Target, target: Target) -> bool:
    if (entry.scheme, entry.host, entry.port) != (target.scheme, target.host, target.port):
        return False
    below = entry.path.rstrip("/") + "/"
    return (target.path.partition("?")[0] + "/").startswith(below)
