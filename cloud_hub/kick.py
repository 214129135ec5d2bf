"""Ends the live connections of nodes that were revoked.

The broker lets nobody revoked in again once it has the new access list and revocation list; but it leaves up who is connected.
So the hub connects under the node's own name, which by MQTT (3.1.4-3) ends the older connection. Done when the broker shows
that it has the lists, and at fixed times in case it never says so. Why this way: docs/adr/0008-ending-a-live-connection.md.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Container

from sync.clock import Clock
from sync.errors import SyncError

WHEN = (5.0, 20.0, 45.0)
"""Seconds after a revocation at which the connection is taken, broker heard of or not: the promise is 60."""
ATTEMPT_SECONDS = 8.0
MAX_PENDING = 10_000
"""Revocations whose connections are still to be ended; beyond it the broker should be restarted anyway."""

Kick = Callable[[str], Awaitable[None]]

log = logging.getLogger(__name__)


class Kicker:
    """`kick` takes one node's place at the broker for a moment; None = the broker ends connections by itself."""

    def __init__(self, kick: Kick | None, clock: Clock) -> None:
        self._kick = kick
        self._clock = clock
        self._due: dict[str, list[float]] = {}
        self._wake = asyncio.Event()
        self.kicked = 0

    def add(self, node_id: str) -> None:
        if self._kick is None or len(self._due) >= MAX_PENDING:
            return
        now = self._clock.monotonic()
        self._due[node_id] = [now + seconds for seconds in WHEN]
        self._wake.set()

    def broker_knows(self, refused: Container[str]) -> None:
        """The broker works by a list that refuses these. Who was revoked after the list was read is not among them: ended now,
        its connection would be back at once."""
        now = self._clock.monotonic()
        for node_id in self._due:
            if node_id in refused:
                self._due[node_id] = [now]
        self._wake.set()

    def readmit(self, node_id: str) -> None:
        """It was enrolled again: its next connection is a rightful one."""
        self._due.pop(node_id, None)

    async def run(self) -> None:
        while True:
            await self._until_due()
            now = self._clock.monotonic()
            for node_id in [node for node, times in self._due.items() if times[0] <= now]:
                await self._once(node_id)

    async def _until_due(self) -> None:
        while not self._due or min(times[0] for times in self._due.values()) > self._clock.monotonic():
            self._wake.clear()
            waits = [asyncio.create_task(_set(self._wake))]
            if self._due:
                first = min(times[0] for times in self._due.values())
                waits.append(asyncio.create_task(_sleep(self._clock, first - self._clock.monotonic())))
            try:
                await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
            finally:
                for task in waits:
                    task.cancel()

    async def _once(self, node_id: str) -> None:
        assert self._kick is not None
        times = self._due[node_id]
        try:
            async with asyncio.timeout(ATTEMPT_SECONDS):
                await self._kick(node_id)
            self.kicked += 1
            log.info("took the place of %s at the broker", node_id)
        except (SyncError, OSError, TimeoutError) as error:
            log.warning("could not end the connection of %s yet: %s", node_id, error or type(error).__name__)
            if len(times) == 1:
                # For ever at this pace: nobody else can end the connection.
                times.append(self._clock.monotonic() + WHEN[0])
        remaining = times[1:]
        if self._due.get(node_id) is not times:
            return  # revoked again, or readmitted, meanwhile
        if remaining:
            self._due[node_id] = remaining
        else:
            del self._due[node_id]


async def _set(event: asyncio.Event) -> None:
    await event.wait()


async def _sleep(clock: Clock, seconds: float) -> None:
    await clock.sleep(seconds)
