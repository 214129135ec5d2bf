"""What arrives for one updater: kept until it can be judged, verified once, counted when it is refused."""

from __future__ import annotations

import asyncio
import logging
from collections import Counter, deque
from collections.abc import Coroutine
from typing import Any

from sync.clock import Clock
from sync.errors import Replayed, SyncError
from sync.packages import Packages
from sync.state import StateStore
from sync.trust import Verified, signer_of, verify

MAX_OFFERS = 8
"""Offers that may wait to be verified; more arrive only from a broken or hostile sender, and the oldest go first."""

log = logging.getLogger(__name__)


class Admission:
    """Belongs to the event loop. `refusals` counts by error code."""

    def __init__(self, kind: str, scope: str, *, packages: Packages, state: StateStore, clock: Clock) -> None:
        self.refusals: Counter[str] = Counter()
        self._kind = kind
        self._scope = scope
        self._packages = packages
        self._disk = state
        self._clock = clock
        self._offers: deque[bytes] = deque(maxlen=MAX_OFFERS)
        self._offered = asyncio.Event()
        self._unjudged: deque[bytes] = deque(maxlen=MAX_OFFERS)
        self._keys_came = False
        self._last_refusal = ""

    def offer(self, envelope: bytes) -> None:
        """Never raises, never blocks."""
        self._offers.append(envelope)
        self._offered.set()

    def look_again(self) -> None:
        """There may be keys for what could not be judged."""
        if self._unjudged:
            self._keys_came = True
            self._offered.set()

    @property
    def waits(self) -> bool:
        """Whether there is something to look at."""
        return bool(self._offers) or (self._keys_came and bool(self._unjudged))

    def arrival(self) -> Coroutine[Any, Any, bool]:
        """To be awaited: over when something comes, from this call on."""
        self._offered.clear()
        return self._offered.wait()

    def pop(self) -> bytes | None:
        """The next to be looked at: what came just now, else the newest of what came before its keys."""
        if self._offers:
            return self._offers.popleft()
        return self._unjudged.pop() if self._keys_came and self._unjudged else None

    async def verify(self, envelope: bytes, under_way: Verified | None) -> Verified:
        """The document inside; it must be newer than the one `under_way`, or the same. Raises a SyncError."""
        kid = signer_of(envelope)
        try:
            keyring = await self._packages.keyring(kid)
        except SyncError:
            if envelope in self._unjudged:
                self._unjudged.remove(envelope)
            self._unjudged.append(envelope)
            self._keys_came = False
            raise
        floor = self._disk.floor(self._kind, self._scope)
        verified = verify(
            envelope,
            keyring,
            kind=self._kind,
            scope=self._scope,
            floor=floor.revision,
            seen=floor.digest,
            now=max(self._clock.wall(), self._disk.time_floor()),
        )
        if under_way is not None and verified.digest != under_way.digest:
            revision, current = verified.document.revision, under_way.document.revision
            if revision <= current:
                raise Replayed(f"revision {revision} is not above {current}, which is under way")
        self._unjudged.clear()  # what came before it and was never verified is older, or will be sent again
        return verified

    def count(self, error: SyncError) -> None:
        """Told to the log when it is another one than the last time."""
        self.refusals[error.code] += 1
        text = f"{error.code}: {error}"
        if text != self._last_refusal:
            log.warning("%s document for %s refused: %s", self._kind, self._scope, text)
        self._last_refusal = text
