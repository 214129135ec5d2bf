"""Keeps the store within its quota while the node runs: what documents name stays, the rest goes when there is no room."""

from __future__ import annotations

import asyncio
import logging
import random
import shutil
from collections.abc import AsyncIterator, Callable, Collection
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

from sync.clock import Clock
from sync.errors import StoreFailed
from sync.quota import Quota, check_room, to_remove
from sync.store import BlobStore

SWEEP_SECONDS = 600.0
"""How often the store is looked at when nothing asks for it; half to one and a half times that."""

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Usage:
    """Bytes. `total`: of all files and half downloads; `needed`: of those that documents name; `free`: of the disk. `removed`:
    files, since the start."""

    total: int
    needed: int
    free: int
    removed: int


class Sweeper:
    """`needed`: digests that must stay, read from the disk: called in a thread."""

    def __init__(
        self,
        store: BlobStore,
        needed: Callable[[], Collection[str]],
        quota: Quota,
        clock: Clock,
        *,
        free: Callable[[Path], int] = lambda path: shutil.disk_usage(path).free,
    ) -> None:
        self.quota = quota
        self._store = store
        self._needed = needed
        self._clock = clock
        self._free = free
        self._coming: dict[str, int] = {}
        self._lock = asyncio.Lock()
        self.latest: Usage | None = None
        """What `usage` last said; None = nothing yet, or the disk refused."""
        self.removed = 0
        """Files, since the start."""
        self.removed_bytes = 0
        self._wake = asyncio.Event()

    async def run(self) -> None:
        """Sweep now and then, and after `look_again`, until cancelled. A disk that refuses is told to the log."""
        while True:
            waits = {
                asyncio.ensure_future(self._wake.wait()),
                asyncio.ensure_future(self._clock.sleep(SWEEP_SECONDS * random.uniform(0.5, 1.5))),  # noqa: S311
            }
            try:
                await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
            finally:
                for wait in waits:
                    wait.cancel()
            self._wake.clear()
            try:
                await self.sweep()
            except StoreFailed as error:
                log.warning("the store could not be swept: %s", error)

    def look_again(self) -> None:
        """Documents changed: sweep soon."""
        self._wake.set()

    async def sweep(self, room: int = 0) -> int:
        """Bring the store within its quota, with `room` bytes to spare if that is possible; how many files went."""
        async with self._lock:
            return await asyncio.to_thread(self._sweep, room)

    async def usage(self) -> Usage:
        """What the store takes now. Raises StoreFailed."""
        try:
            self.latest = await asyncio.to_thread(self._usage)
        except StoreFailed:
            self.latest = None
            raise
        return self.latest

    @asynccontextmanager
    async def room_for(self, digest: str, size: int) -> AsyncIterator[None]:
        """Inside, `size` bytes of `digest` may be written. Raises StoreFailed when they do not fit, whatever is removed."""
        async with self._lock:
            self._coming[digest] = size
            try:
                await asyncio.to_thread(self._make_room, digest)
            except BaseException:
                del self._coming[digest]
                raise
        try:
            yield
        finally:
            self._coming.pop(digest, None)

    def _make_room(self, digest: str) -> None:
        self._sweep(self._outstanding())
        check_room(
            sum(entry.size for entry in self._store.entries()),
            self._free(self._store.root),
            self._outstanding(),
            self.quota,
        )

    def _outstanding(self) -> int:
        """Bytes that the downloads under way will still write."""
        there = {entry.digest: entry.size for entry in self._store.entries() if entry.half}
        return sum(max(0, size - there.get(digest, 0)) for digest, size in list(self._coming.items()))

    def _sweep(self, room: int) -> int:
        # First the time, then what is needed: a file that is claimed later than this is passed over.
        began = self._store.now()
        needed = self._needed()
        chosen = to_remove(
            self._store.entries(), needed, tuple(self._coming), self.quota, self._free(self._store.root), room
        )
        removed = 0
        for entry in chosen:
            if self._store.remove(entry, unless_claimed_since=began):
                removed += 1
                self.removed += 1
                self.removed_bytes += entry.size
        return removed

    def _usage(self) -> Usage:
        needed = self._needed()
        entries = list(self._store.entries())
        return Usage(
            total=sum(entry.size for entry in entries),
            needed=sum(entry.size for entry in entries if entry.digest in needed),
            free=self._free(self._store.root),
            removed=self.removed,
        )
