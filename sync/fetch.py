"""Files over HTTP: ranged, resumable, hashed while they stream, from the nearest source that has them.

A source is trusted for nothing: no byte beyond the signed size is read, a wrong length or digest deletes what came, and
redirects are not followed. A transfer runs in a daemon thread of its own; cancelling it, or the end of its time, cuts its
socket. Such a thread may still be about to end when the next one begins: the lock on the file keeps them apart.
"""

from __future__ import annotations

import asyncio
import logging
import random
from collections.abc import Callable, Sequence
from contextlib import AbstractAsyncContextManager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol, TypeVar
from weakref import WeakValueDictionary

from sync.blocks import SCHEME as BLOCKS
from sync.blocks import Blocks
from sync.clock import Clock, SystemClock
from sync.daemon import in_daemon
from sync.delta import Offer
from sync.delta import apply as apply_delta
from sync.delta_fetch import MAX_OFFER_BYTES, MIN_BYTES, bases_for, question, read_offer
from sync.download import Busy, Download, Limits, Mismatch, Route
from sync.errors import Absent, DigestMismatch, Malformed, SyncError, Unavailable
from sync.folder_source import SCHEME, FolderRead
from sync.pace import Pace
from sync.part import Part, taken
from sync.store import BlobStore
from sync.traffic import BLOCKS as OVER_MQTT
from sync.traffic import DELTA, MEDIUM, METADATA, WHOLE, Counted, Traffic, way_of

ROUNDS = 3
"""How often every source is asked for one file before the caller hears of it (and has its own, longer backoff)."""
ROUND_SECONDS = 0.5
"""Pause after the first round; doubled after each further one, jittered."""
BUSY_SECONDS = 120.0
"""How long a source that says it is busy is waited for, for one file: what stands behind it costs more."""
BUSY_RATE = 100_000.0
"""Bytes per second: a file of so many is waited for a second longer, since a mirror may be fetching it for us."""
DELTA_SECONDS = 15.0
"""How long a source is waited for that is making a delta; then the whole file is fetched."""
MAX_PARALLEL = 2
"""Files at once: a node's uplink is rarely faster with more."""

log = logging.getLogger(__name__)

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Source:
    """`url`: base of `/blobs/{digest}` and of signed documents, or file:///folder, or mqtt:. `token`: bearer credential, if it
    wants one; a function makes it anew for each transfer, or None. `route`: how to get there."""

    url: str
    token: str | Callable[[], str | None] | None = field(default=None, repr=False)
    route: Route | None = None


class Transfer(Counted, Protocol):
    """One file of one source, read in a thread. `stop` is called from another one."""

    def into(self, part: Part, digest: str, size: int) -> None: ...
    def read(self, limit: int) -> bytes: ...
    def size(self) -> int: ...
    def stop(self, why: str = ...) -> None: ...


class Fetcher:
    """Brings files into the store. `limits`: timeouts, budget and rate of one transfer."""

    def __init__(
        self, sources: Sequence[Source], store: BlobStore, *, clock: Clock | None = None, limits: Limits | None = None
    ) -> None:
        self._sources = tuple(sources)
        self._store = store
        self._clock = clock or SystemClock()
        self._limits = limits or Limits()
        self.pace = Pace()
        """What an update may use of the network; may be changed at any time."""
        self.room_for: Callable[[str, int], AbstractAsyncContextManager[None]] = lambda digest, size: nullcontext()
        """Around each transfer of (digest, size). Raises StoreFailed when it must not be written."""
        self._blocks: Blocks | None = None
        self.deltas = True
        """Whether sources are asked for deltas."""
        self.traffic = Traffic()
        self._slots = asyncio.Semaphore(MAX_PARALLEL)
        self._running: set[Transfer] = set()
        # Weak: a lock is forgotten when the last call that holds or awaits it is gone, never before.
        self._locks: WeakValueDictionary[str, asyncio.Lock] = WeakValueDictionary()

    def close(self) -> None:
        """Cut every transfer that still runs."""
        for request in list(self._running):
            request.stop()

    async def fetch(self, digest: str, size: int) -> Path:
        """The blob's path, once its `size` bytes are verified and durable. Concurrent calls for one digest share the work.

        Raises Unavailable when no source delivered, DigestMismatch when all that did delivered other bytes, StoreFailed.
        """
        lock = self._locks.setdefault(digest, asyncio.Lock())
        async with lock:
            if not self._store.claim(digest):
                with self.traffic.file():
                    async with self.room_for(digest, size):
                        way = DELTA if await self._bring_by_delta(digest, size) else await self._bring(digest, size)
                self.traffic.files[way] += 1
            return self._store.path(digest)

    @property
    def sources(self) -> tuple[Source, ...]:
        """Nearest first."""
        return self._sources

    def add(self, source: Source) -> None:
        """Ask this one before all others from now on: a folder that a medium brought."""
        self._sources = (source, *(known for known in self._sources if known != source))

    def fall_back_to(self, blocks: Blocks) -> None:
        """Ask for blocks over MQTT when no other source delivers."""
        self._blocks = blocks
        self._sources = (*(known for known in self._sources if known.url != BLOCKS), Source(BLOCKS))

    def drop(self, source: Source) -> None:
        """Ask it no more."""
        self._sources = tuple(known for known in self._sources if known != source)

    async def get(self, source: Source, path: str, limit: int) -> bytes:
        """A small file at `path` of one source, at most `limit` bytes, unverified.

        Raises Absent when the source does not have it, Unavailable, Malformed when it is longer.
        """
        request = self._request(source, path)
        return await self._in_thread(request, limit, lambda: request.read(limit), _way(source, METADATA))

    async def size(self, digest: str) -> int:
        """Bytes of a blob as the first source that has it says, unverified. Raises Absent when none has it, Unavailable."""
        absent, why = True, "no source is configured"
        for source in self._sources:
            request = self._request(source, f"/blobs/{digest}")
            try:
                return await self._in_thread(request, 0, request.size, _way(source, METADATA))
            except Unavailable as error:
                absent, why = absent and isinstance(error, Absent), str(error)
        raise Absent(why) if absent and self._sources else Unavailable(why)

    async def _bring_by_delta(self, digest: str, size: int) -> bool:
        """Whether the file was made from one that is here. Whatever goes wrong, the whole file is the way out."""
        near = any(source.url.startswith(SCHEME) for source in self._sources)
        if not self.deltas or near or size < MIN_BYTES:
            return False
        try:
            entries = list(await asyncio.to_thread(self._store.entries))
            bases = bases_for(digest, size, entries)
            here = sum(entry.size for entry in entries if entry.half and entry.digest == digest)
            offer = await self._offered(question(digest, bases), bases, size - here) if bases else None
            if offer is None or not self._store.claim(offer.base):
                return False
            if not self._store.claim(offer.delta):
                async with self.room_for(offer.delta, offer.size):
                    await self._bring(offer.delta, offer.size, DELTA)
            await self._make(digest, size, offer)
        except SyncError as error:
            self.traffic.refused_deltas += 1
            log.warning("a delta was of no use, the whole file is fetched: %s: %s", error.code, error)
            return False
        self.traffic.saved += size - offer.size
        return True

    async def _offered(self, path: str, bases: Sequence[str], missing: int) -> Offer | None:
        """The first source's offer that is worth it; a source without one is passed over."""
        patience = DELTA_SECONDS
        for source in (source for source in self._sources if source.url != BLOCKS):
            while True:
                try:
                    return read_offer(await self.get(source, path, MAX_OFFER_BYTES), bases, missing)
                except Busy as error:
                    wait = max(error.seconds, ROUND_SECONDS) * random.uniform(1.0, 1.5)  # noqa: S311
                    if wait > patience:
                        return None
                    patience -= wait
                    await self._clock.sleep(wait)
                except (Unavailable, Malformed):
                    break
        return None

    async def _make(self, digest: str, size: int, offer: Offer) -> None:
        """Raises Malformed, StoreFailed, Unavailable."""
        staged = self._store.staging(digest)
        made = staged.with_suffix(".delta")

        def work() -> None:
            base, delta = self._store.path(offer.base), self._store.path(offer.delta)
            with taken(staged) as part:
                apply_delta(base, delta, made, base_digest=offer.base, digest=digest, size=size)
                self._store.publish(digest, made)
                part.remove()

        await in_daemon(work, "a transfer")

    async def _bring(self, digest: str, size: int, what: str = WHOLE) -> str:
        """The way it came."""
        good, reasons = list(self._sources), ["no source is configured"]
        mismatch: Mismatch | None = None
        patience = {source.url: BUSY_SECONDS + size / BUSY_RATE for source in good}
        for round_number in range(ROUNDS):
            if round_number:
                await self._clock.sleep(ROUND_SECONDS * 2 ** (round_number - 1) * random.uniform(0.5, 1.5))  # noqa: S311
            reasons = reasons if not good else []
            for source in list(good):
                # Blocks share their way with what the hub has to say: only when nothing else so much as answers.
                early = len(good) > 1 and round_number < ROUNDS - 1
                if source.url == BLOCKS and (early or mismatch is not None):
                    continue
                try:
                    return await self._patiently(source, digest, size, patience, what)
                except Mismatch as error:
                    mismatch = error
                    good.remove(source)
                except Unavailable as error:
                    reasons.append(str(error))
            if not good or (mismatch is not None and not _besides_blocks(good)):
                break
        if mismatch is not None and not _besides_blocks(good):
            raise DigestMismatch(str(mismatch))
        raise Unavailable("; ".join(reasons))

    async def _patiently(self, source: Source, digest: str, size: int, patience: dict[str, float], what: str) -> str:
        """A source that is busy is asked again when it says so, jittered, while there is patience left for it."""
        while True:
            try:
                with self.traffic.attempt():
                    return await self._from(source, digest, size, _way(source, what))
            except Busy as error:
                wait = max(error.seconds, ROUND_SECONDS) * random.uniform(1.0, 1.5)  # noqa: S311
                if wait > patience[source.url]:
                    raise
                patience[source.url] -= wait
                await self._clock.sleep(wait)

    async def _from(self, source: Source, digest: str, size: int, way: str) -> str:
        request = self._request(source, f"/blobs/{digest}")

        def work() -> None:
            staged = self._store.staging(digest)
            with taken(staged) as part:
                request.into(part, digest, size)
                # Published before the lock goes: from then on nobody has this inode open for writing.
                self._store.publish(digest, staged)

        async with self._slots:
            await self._in_thread(request, size, work, way)
        return way_of(request, way)

    def _request(self, source: Source, path: str) -> Transfer:
        if source.url == BLOCKS and self._blocks is not None:
            return self._blocks.transfer(path)
        if source.url.startswith(SCHEME):
            return FolderRead(source.url, path)
        return Download(source.url + path, source.token, self._limits, self.pace, source.route)

    async def _in_thread(self, request: Transfer, size: int, work: Callable[[], T], way: str) -> T:
        """Run `work`, whose transfer is cut when its time is over; when cancelled, cut it and wait for its thread."""
        slowest = None if self.pace.rate is None else self.pace.rate / MAX_PARALLEL
        seconds = self._limits.seconds(size, slowest)
        late = asyncio.get_running_loop().call_later(seconds, request.stop, f"not done within {seconds:.1f} s")
        self._running.add(request)
        try:
            with self.traffic.watching(request, way):
                future = in_daemon(work, "a transfer")
                try:
                    return await asyncio.shield(future)
                except asyncio.CancelledError:
                    request.stop()
                    future.add_done_callback(lambda done: done.cancelled() or done.exception())  # nobody else will look
                    await asyncio.wait({future}, timeout=self._limits.read_seconds + 1)
                    raise
        finally:
            late.cancel()
            self._running.discard(request)


def _way(source: Source, what: str) -> str:
    """What carries it comes first."""
    if source.url == BLOCKS:
        return OVER_MQTT
    return MEDIUM if source.url.startswith(SCHEME) else what


def _besides_blocks(sources: Sequence[Source]) -> list[Source]:
    return [source for source in sources if source.url != BLOCKS]
