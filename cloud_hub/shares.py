"""What each node may take of the hub's files at once. In the event loop.

GET /blobs/{digest} -> SharedFile -> a slot, or 429 with Retry-After -> the file, piece by piece -> the slot is free again
"""

from __future__ import annotations

import asyncio
import logging
from collections import Counter
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from typing import Any

from starlette.responses import StreamingResponse

from cloud_hub.auth import Principal, Role
from models.errors import Overloaded

SLOTS = 128
"""Files being sent at once, of all nodes. A quarter of the connections the server takes, so that metadata and the API answer
while all are in use; each holds about 320 KiB of memory."""
NODE_SLOTS = 4
"""Of one node: twice what it fetches at once (`sync.fetch.MAX_PARALLEL`), since the hub notices a lost connection late."""
NODE_SECONDS = 2.0
"""When to come back for a slot of one's own: nodes add their jitter."""
FULL_SECONDS = 10.0
"""When to come back while all slots are taken: of a large fleet that waits, every question costs a signature. Nodes are patient
for two minutes and longer."""
SMALL_BYTES = 32 * 1024
"""So much fits the server's write buffer (64 KiB), however slowly it is taken, and needs no slot. A question for a file's size
is one byte."""
PIECE_BYTES = 64 * 1024
PIECE_SECONDS = 180.0
"""A reader that takes a piece no faster is cut off, and its slot is free. The slowest that settings allow, 1 kB/s for two
files, takes 131 s; one whose connection is lost takes none."""

log = logging.getLogger(__name__)


class Shares:
    """Counts the transfers under way."""

    def __init__(self, slots: int = SLOTS, node_slots: int = NODE_SLOTS) -> None:
        self._slots = slots
        self._node_slots = node_slots
        self._running: Counter[str] = Counter()

    @property
    def running(self) -> int:
        """Transfers under way."""
        return self._running.total()

    @contextmanager
    def slot(self, who: Principal) -> Iterator[None]:
        """A transfer of `who`, until the block ends. Raises Overloaded, saying when to come back.

        The admin's transfers count, and are never refused: whoever has that token can stop the hub in other ways.
        """
        if who.role is not Role.ADMIN:
            if self._running[who.name] >= self._node_slots:
                raise Overloaded(f"{self._running[who.name]} files are being sent to this node", NODE_SECONDS)
            if self.running >= self._slots:
                raise Overloaded(f"{self.running} files are being sent", FULL_SECONDS)
        self._running[who.name] += 1
        try:
            yield
        finally:
            self._running[who.name] -= 1
            if not self._running[who.name]:
                del self._running[who.name]


class SharedFile(StreamingResponse):
    """A file of `length` bytes on its way to `who`. Raises Overloaded before anything is sent."""

    def __init__(
        self,
        shares: Shares,
        who: Principal,
        length: int,
        content: AsyncIterator[bytes],
        status: int,
        headers: dict[str, str],
    ) -> None:
        super().__init__(content, status, {**headers, "content-length": str(length)}, "application/octet-stream")
        self._shares = shares
        self._who = who
        self._small = length <= SMALL_BYTES

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if self._small:
            await super().__call__(scope, receive, send)
            return
        with self._shares.slot(self._who):
            try:
                await super().__call__(scope, receive, _piecewise(send))
            except TimeoutError:
                # An answer that ends before its length: the server closes the connection.
                log.info("a file was not taken any more by %s: cut off", self._who.name)


def _piecewise(send: Any) -> Any:
    """Raises TimeoutError when a piece is not taken in time."""

    async def patient(message: Any) -> None:
        body = message.get("body", b"")
        for start in range(PIECE_BYTES, len(body), PIECE_BYTES):
            piece = {**message, "body": body[start - PIECE_BYTES : start], "more_body": True}
            async with asyncio.timeout(PIECE_SECONDS):
                await send(piece)
        if body:
            message = {**message, "body": body[(len(body) - 1) // PIECE_BYTES * PIECE_BYTES :]}
        async with asyncio.timeout(PIECE_SECONDS):
            await send(message)

    return patient
