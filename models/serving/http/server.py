"""A listening socket around `models.serving.http.service`, with a graceful end."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress

from models.serving.exchange import Handler
from models.serving.http.service import HttpLimits, HttpService

BACKLOG = 1024
"""Connections the system may hold for us that we have not accepted yet."""
_SWEEP_SECONDS = 1.0


class HttpServer:
    """Where a server listens."""

    def __init__(self, host: str, port: int) -> None:
        self.host = host
        self.port = port

    @property
    def url(self) -> str:
        return f"http://[{self.host}]:{self.port}" if ":" in self.host else f"http://{self.host}:{self.port}"


@asynccontextmanager
async def serve_http(
    handler: Handler,
    *,
    host: str = "127.0.0.1",
    port: int = 0,
    limits: HttpLimits = HttpLimits(),  # noqa: B008 - frozen
    drain_seconds: float = 5.0,
) -> AsyncIterator[HttpServer]:
    """Serve `handler` while the context lasts. `port` 0 = chosen by the system.

    On leaving: stops accepting, lets requests in work finish for up to `drain_seconds`, then closes. Raises OSError, saying
    where and why, when it cannot listen.
    """
    loop = asyncio.get_running_loop()
    service = HttpService(handler, limits, loop)
    try:
        server = await loop.create_server(service.connect, host, port, backlog=BACKLOG)
    except OSError as error:
        reason = os.strerror(error.errno) if error.errno and error.errno > 0 else error.strerror or str(error)
        raise OSError(error.errno, f"cannot listen on {host} port {port}: {reason}") from error
    sweeping = loop.create_task(_sweep(service))
    try:
        yield HttpServer(host, server.sockets[0].getsockname()[1])
    finally:
        server.close()
        service.drain()
        with suppress(TimeoutError):
            await asyncio.wait_for(service.empty.wait(), drain_seconds)
        service.abort()
        sweeping.cancel()
        await asyncio.wait((sweeping,))


async def _sweep(service: HttpService) -> None:
    while True:
        await asyncio.sleep(_SWEEP_SECONDS)
        service.sweep()
