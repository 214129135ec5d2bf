"""The application asks the updater to wait: a robot moves, a surgeon looks, a line runs. Bounded, and never for ever.

A hold delays activation only; files are fetched meanwhile. Going back from a bad version is not delayed.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass
from math import isfinite
from uuid import uuid4

from sync.clock import Clock
from sync.errors import Malformed, StoreFailed
from sync.state import StateStore

MAX_HOLDS = 64
"""Holds at once: parts of one application, not requests."""
MAX_REASON = 200


@dataclass(frozen=True, slots=True)
class Hold:
    """`until`: monotonic seconds."""

    id: str
    reason: str
    until: float


class Holds:
    """Belongs to the event loop. `limit()`: the longest a hold may last, seconds."""

    def __init__(self, clock: Clock, limit: Callable[[], float], state: StateStore | None = None) -> None:
        self._clock = clock
        self._limit = limit
        self._disk = state
        self._holds: dict[str, Hold] = {}
        self._kept: set[str] = set()
        self._watchers: list[Callable[[], None]] = []

    def restore(self) -> None:
        """Bring back those that were kept on the disk; the wall clock says what is left of them, never more than the limit.

        Raises StoreFailed.
        """
        if self._disk is None:
            return
        now, wall = self._clock.monotonic(), self._clock.wall()
        for name, reason, until in self._disk.holds():
            if until > wall:
                self._holds[name] = Hold(name, reason, now + min(until - wall, self._limit()))
            self._kept.add(name)

    def hold(self, reason: str, seconds: float | None = None) -> Hold:
        """Hold from now on, for `seconds` or until `release`; None or more than the limit = the limit.

        Raises Malformed for an empty or overlong reason, a length that is none, or too many holds at once.
        """
        if not reason or len(reason) > MAX_REASON or not reason.isprintable():
            raise Malformed(f"reason: 1 to {MAX_REASON} printable characters are needed")
        if seconds is not None and not (isfinite(seconds) and seconds > 0):
            raise Malformed(f"seconds: {seconds} is not a positive number")
        self._drop_expired()
        if len(self._holds) >= MAX_HOLDS:
            raise Malformed(f"{MAX_HOLDS} holds are there, no more are accepted")
        limit = self._limit()
        made = Hold(uuid4().hex, reason, self._clock.monotonic() + (limit if seconds is None else min(seconds, limit)))
        self._holds[made.id] = made
        self._tell()
        return made

    async def keep(self, hold: Hold) -> None:
        """Let `hold` outlive this process: who asked for it lives in another one. Raises StoreFailed."""
        if self._disk is not None:
            until = self._clock.wall() + hold.until - self._clock.monotonic()
            self._drop_expired()
            over = self._kept - self._holds.keys()
            self._kept = {*(self._kept - over), hold.id}
            await asyncio.to_thread(self._disk.keep_hold, hold.id, hold.reason, until, over)

    def release(self, name: str) -> bool:
        """Whether there was such a hold."""
        known = self._holds.pop(name, None) is not None
        if known:
            self._tell()
        return known

    async def forget(self, name: str) -> None:
        """After `release`, on the disk too. A disk that refuses costs at most a hold that lasts to its end after a restart."""
        if self._disk is None or name not in self._kept:
            return
        self._kept.discard(name)
        try:
            await asyncio.to_thread(self._disk.forget_hold, name)
        except StoreFailed:
            self._kept.add(name)

    def current(self) -> Hold | None:
        """The one that lasts longest."""
        self._drop_expired()
        return max(self._holds.values(), key=lambda hold: hold.until, default=None)

    def all(self) -> list[Hold]:
        self._drop_expired()
        return sorted(self._holds.values(), key=lambda hold: hold.until)

    def watch(self, changed: Callable[[], None]) -> None:
        """Call `changed` whenever a hold comes or goes."""
        self._watchers.append(changed)

    def _drop_expired(self) -> None:
        now = self._clock.monotonic()
        self._holds = {name: hold for name, hold in self._holds.items() if hold.until > now}

    def _tell(self) -> None:
        for changed in self._watchers:
            changed()
