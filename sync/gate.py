"""Whether an update may go on now: holds, maintenance windows, and the hub's word that overrides both."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass

from sync.clock import Clock
from sync.holds import Holds
from sync.settings import Settings
from sync.windows import is_open, next_opening

LOOK_SECONDS = 3600.0
"""Longest wait between two looks: a wall clock may be set meanwhile, and windows go by it."""


@dataclass(frozen=True, slots=True)
class Obstacle:
    """`event`: of `sync.states`. `seconds`: after which to look again at the latest. `seen`: how many changes it knows of."""

    event: str
    reason: str
    seconds: float
    seen: int


class Gate:
    """`settings()`: those in force. Belongs to the event loop."""

    def __init__(self, holds: Holds, settings: Callable[[], Settings], clock: Clock) -> None:
        self._holds = holds
        self._settings = settings
        self._clock = clock
        self._waiting: set[asyncio.Event] = set()
        self._changes = 0
        holds.watch(self.look_again)

    def look_again(self) -> None:
        """Settings or holds are others than before."""
        self._changes += 1
        for waiting in self._waiting:
            waiting.set()

    def obstacle(self, revision: int, held: float) -> Obstacle | None:
        """What stands in the way of the update to `revision`, which holds have delayed for `held` seconds so far."""
        settings = self._settings()
        if revision <= settings.force:
            return None
        hold, left = self._holds.current(), settings.max_hold_seconds - held
        # One hold after the other must not add up to more than one may last.
        if hold is not None and left > 0:
            return Obstacle("hold", hold.reason, min(hold.until - self._clock.monotonic(), left), self._changes)
        wall = self._clock.wall()
        if is_open(settings.windows, wall):
            return None
        opening = next_opening(settings.windows, wall)
        seconds = LOOK_SECONDS if opening is None else opening - wall
        return Obstacle("window", "no maintenance window is open", min(seconds, LOOK_SECONDS), self._changes)

    async def changed(self, obstacle: Obstacle) -> None:
        """Return after its seconds, or when something is other than it was when `obstacle` was found."""
        if self._changes != obstacle.seen:
            return
        event = asyncio.Event()
        self._waiting.add(event)
        waits = [asyncio.ensure_future(event.wait()), asyncio.ensure_future(self._clock.sleep(obstacle.seconds))]
        try:
            await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
        finally:
            self._waiting.discard(event)
            for wait in waits:
                wait.cancel()
