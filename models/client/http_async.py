"""Calls over HTTP in an event loop, on the connections that the tiers speak over as well."""

from __future__ import annotations

import asyncio
import time
from typing import TypeVar, cast

from models.client.calls import Call
from models.client.http_calls import HttpCall, milliseconds_of
from models.errors import DeadlineExceeded
from models.serving.endpoint import Endpoint
from models.serving.wire import Pool

T = TypeVar("T")


class AsyncHttp:
    """`AsyncTransport` with at most `size` connections; who finds none free waits until the deadline."""

    def __init__(self, endpoint: Endpoint, *, size: int, connect_timeout: float) -> None:
        self._peer = endpoint.peer
        self._pool = Pool(endpoint, size=size, connect_timeout=connect_timeout)

    async def run(self, call: Call[T], deadline: float) -> T:
        http = cast(HttpCall[T], call)
        remaining = deadline - time.monotonic()
        if remaining <= 0:
            raise DeadlineExceeded(f"{self._peer} did not answer within the deadline")
        # A loop's clock need not be time.monotonic.
        until = asyncio.get_running_loop().time() + remaining
        parts = http.parts(milliseconds_of(remaining))
        return http.read(await self._pool.exchange(parts, until, fresh=not http.repeatable))

    async def close(self) -> None:
        self._pool.close()
