"""Files over HTTP: ranged, resumable, hashed while they stream, from the nearest source that has them.

A source is trusted for nothing: no byte beyond the signed size is read, a wrong length or digest deletes what came, and
redirects are not followed. Transfers run in a small thread pool of their own; cancelling one cuts its socket.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TypeVar

from sync.clock import Clock, SystemClock
from sync.download import Download, Limits, Mismatch
from sync.errors import DigestMismatch, Malformed, Unavailable
from sync.messages import MAX_DOCUMENT_BYTES
from sync.store import BlobStore

ROUNDS = 3
"""How often every source is asked for one file before the caller hears of it (and has its own, longer backoff)."""
ROUND_SECONDS = 0.5
"""Pause after the first round; doubled after each further one, jittered."""
MAX_PARALLEL = 2
"""Transfers at once: a node's uplink is rarely faster with more."""

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Source:
    """`url`: base of `/blobs/{digest}` and of signed documents. `token`: bearer credential, if it wants one."""

    url: str
    token: str | None = field(default=None, repr=False)


class Fetcher:
    """Brings files into the store. `limits`: timeouts, budget and rate of one transfer."""

    def __init__(
        self, sources: Sequence[Source], store: BlobStore, *, clock: Clock | None = None, limits: Limits | None = None
    ) -> None:
        self._sources = tuple(sources)
        self._store = store
        self._clock = clock or SystemClock()
        self._limits = limits or Limits()
        self._threads = ThreadPoolExecutor(MAX_PARALLEL, thread_name_prefix="fetch")
        self._locks: dict[str, asyncio.Lock] = {}

    def close(self) -> None:
        """Running transfers end with their tasks."""
        self._threads.shutdown(wait=False, cancel_futures=True)

    async def fetch(self, digest: str, size: int) -> Path:
        """The blob's path, once its `size` bytes are verified and durable. Concurrent calls for one digest share the work.

        Raises Unavailable when no source delivered, DigestMismatch when all that did delivered other bytes, StoreFailed.
        """
        lock = self._locks.setdefault(digest, asyncio.Lock())
        try:
            async with lock:
                if not self._store.has(digest):
                    await self._bring(digest, size)
                return self._store.path(digest)
        finally:
            if not lock.locked():
                self._locks.pop(digest, None)

    async def document(self, path: str, *, enough: Callable[[bytes], bool] = bool) -> bytes:
        """A small signed document at `path`, at most MAX_DOCUMENT_BYTES, from the first source whose answer is `enough`.

        A mirror may be behind: when no answer is enough, the last one that came. Raises Unavailable when none came.
        """
        answer, why = None, "no source is configured"
        for source in self._sources:
            request = Download(source.url + path, source.token, self._limits)
            try:
                answer = await self._in_thread(request, partial(request.read, MAX_DOCUMENT_BYTES))
            except (Unavailable, Malformed) as error:
                why = str(error)
                continue
            if enough(answer):
                break
        if answer is None:
            raise Unavailable(f"{path}: {why}")
        return answer

    async def _bring(self, digest: str, size: int) -> None:
        good, reasons = list(self._sources), ["no source is configured"]
        mismatch: Mismatch | None = None
        for round_number in range(ROUNDS):
            if round_number:
                await self._clock.sleep(ROUND_SECONDS * 2 ** (round_number - 1) * random.uniform(0.5, 1.5))  # noqa: S311
            reasons = reasons if not good else []
            for source in list(good):
                try:
                    return await self._from(source, digest, size)
                except Mismatch as error:
                    mismatch = error
                    good.remove(source)
                except Unavailable as error:
                    reasons.append(str(error))
            if not good:
                break
        if mismatch is not None and not good:
            raise DigestMismatch(str(mismatch))
        raise Unavailable("; ".join(reasons))

    async def _from(self, source: Source, digest: str, size: int) -> None:
        staged = self._store.staging(digest)
        request = Download(f"{source.url}/blobs/{digest}", source.token, self._limits)
        await self._in_thread(request, partial(request.into, staged, digest, size))
        await asyncio.get_running_loop().run_in_executor(self._threads, self._store.publish, digest, staged)

    async def _in_thread(self, request: Download, work: Callable[[], T]) -> T:
        """Run `work`; when cancelled, stop the transfer and wait for its thread, which still holds the file."""
        future = asyncio.get_running_loop().run_in_executor(self._threads, work)
        try:
            return await asyncio.shield(future)
        except asyncio.CancelledError:
            request.stop()
            await asyncio.wait({future}, timeout=self._limits.read_seconds + 1)
            raise
