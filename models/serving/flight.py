"""A version on its way back into memory, and its place among those that wait for room."""

from __future__ import annotations

import asyncio

from models.errors import NotReady
from models.serving.drive import Parked

MAX_OVERTAKEN = 8
"""How often a version that waits for room may see others, that fit now, pass it before it is let alone for a while."""
ALONE_SECONDS = 1.0
"""For how long nothing passes it then: longer than the hold of those that did, so that it can take their places."""


class Flight:
    """One loading on demand and those who wait for it. `since`: monotonic seconds. `room`: False = no longer wanted."""

    __slots__ = ("loading", "overtaken", "overtaken_at", "room", "since", "task", "waiters")

    def __init__(self, since: float) -> None:
        self.waiters: set[Parked[None]] = set()
        self.since = since
        self.room: asyncio.Future[bool] = asyncio.get_running_loop().create_future()
        self.loading = False
        self.overtaken = 0
        self.overtaken_at = since
        self.task: asyncio.Task[None] | None = None

    @property
    def has_room(self) -> bool:
        return self.room.done() and not self.room.cancelled() and self.room.result()

    def may_be_overtaken(self, now: float) -> bool:
        if self.overtaken >= MAX_OVERTAKEN and now >= self.overtaken_at + ALONE_SECONDS:
            self.overtaken = 0
        return self.overtaken < MAX_OVERTAKEN

    def land(self, reason: str) -> None:
        for waiter in list(self.waiters):
            if reason:
                waiter.fail(NotReady(reason))
            else:
                waiter.give(None)
