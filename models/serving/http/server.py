"""Listening sockets around `models.serving.http.service`, with a graceful end: TCP, TLS and a Unix socket at once."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING

from models.serving.exchange import Handler
from models.serving.http.service import HttpLimits, HttpService
from models.serving.http.unix import unix_socket

if TYPE_CHECKING:
    from ssl import SSLContext

BACKLOG = 1024
"""Connections the system may hold for us that we have not accepted yet."""
HANDSHAKE_SECONDS = 5.0
"""From connecting to the end of the TLS handshake: a slow client needs half of it, a hostile one must not hold it longer."""
TLS_CLOSE_SECONDS = 2.0
"""How long a client may take to say goodbye too."""
_SWEEP_SECONDS = 1.0


class HttpServer:
    """Where a server listens. `port` 0 = on a Unix socket alone. `unix`: None = there is none."""

    def __init__(self, host: str, port: int, *, encrypted: bool = False, unix: Path | None = None) -> None:
        self.host = host
        self.port = port
        self.encrypted = encrypted
        self.unix = unix

    @property
    def url(self) -> str:
        """The first of `urls`."""
        return self.urls[0]

    @property
    def urls(self) -> tuple[str, ...]:
        """Every address to reach it by: http:// or https://, then unix://."""
        found = []
        if self.port:
            host = f"[{self.host}]" if ":" in self.host else self.host
            found.append(f"{'https' if self.encrypted else 'http'}://{host}:{self.port}")
        if self.unix is not None:
            found.append(f"unix://{self.unix.absolute()}")
        return tuple(found)


@asynccontextmanager
async def serve_http(
    handler: Handler,
    *,
    host: str | None = "127.0.0.1",
    port: int = 0,
    tls: SSLContext | None = None,
    unix: Path | None = None,
    unix_mode: int = 0o600,
    limits: HttpLimits = HttpLimits(),  # noqa: B008 - frozen
    drain_seconds: float = 5.0,
) -> AsyncIterator[HttpServer]:
    """Serve `handler` while the context lasts. `port` 0 = chosen by the system.

    `host` None = no TCP. `tls` (see `models.serving.access.tls`): TCP is TLS alone, then. `unix`: also listen on a socket of
    this path, with `unix_mode`: by default only the same user can connect. The limits hold for all of them together.

    On leaving: stops accepting, lets requests in work finish for up to `drain_seconds`, then closes. Raises OSError, saying
    where and why, when it cannot listen.
    """
    if host is None and unix is None:
        raise ValueError("a server listens on a host or on a Unix socket: neither was given")
    loop = asyncio.get_running_loop()
    service = HttpService(handler, limits, loop)
    async with AsyncExitStack() as listening:
        servers = []
        if host is not None:
            servers.append(await _listen(service, host, port, tls))
            listening.callback(servers[0].close)
        bound = port if host is None else servers[0].sockets[0].getsockname()[1]
        if unix is not None:
            sock = listening.enter_context(unix_socket(unix, unix_mode))
            servers.append(await loop.create_unix_server(service.connect, sock=sock, backlog=BACKLOG))
            listening.callback(servers[-1].close)
        sweeping = loop.create_task(_sweep(service))
        try:
            yield HttpServer(host or "", 0 if host is None else bound, encrypted=tls is not None, unix=unix)
        finally:
            for server in servers:
                server.close()
            service.drain()
            with suppress(TimeoutError):
                await asyncio.wait_for(service.empty.wait(), drain_seconds)
            service.abort()
            sweeping.cancel()
            await asyncio.wait((sweeping,))


async def _listen(service: HttpService, host: str, port: int, tls: SSLContext | None) -> asyncio.Server:
    seconds = (None, None) if tls is None else (HANDSHAKE_SECONDS, TLS_CLOSE_SECONDS)
    try:
        return await service.loop.create_server(
            service.connect,
            host,
            port,
            backlog=BACKLOG,
            ssl=tls,
            ssl_handshake_timeout=seconds[0],
            ssl_shutdown_timeout=seconds[1],
        )
    except OSError as error:
        reason = os.strerror(error.errno) if error.errno and error.errno > 0 else error.strerror or str(error)
        raise OSError(error.errno, f"cannot listen on {host} port {port}: {reason}") from error


async def _sweep(service: HttpService) -> None:
    while True:
        await asyncio.sleep(_SWEEP_SECONDS)
        service.sweep()
