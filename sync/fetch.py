"""Files over HTTP: ranged, resumable, hashed while they stream, from the nearest source that has them.

A source is trusted for nothing: no byte beyond the signed size is read, a wrong length or digest deletes what came, and
redirects are not followed. A transfer runs in a daemon thread of its own; cancelling it, or the end of its time, cuts its
socket. Such a thread may still be about to end when the next one begins: the lock on the file keeps them apart.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from pathlib import Path
from threading import Thread
from typing import TypeVar
from weakref import WeakValueDictionary

from sync.clock import Clock, SystemClock
from sync.download import Download, Limits, Mismatch
from sync.errors import DigestMismatch, Malformed, Unavailable
from sync.messages import MAX_DOCUMENT_BYTES
from sync.part import taken
from sync.store import BlobStore

ROUNDS = 3
"""How often every source is asked for one file before the caller hears of it (and has its own, longer backoff)."""
ROUND_SECONDS = 0.5
"""Pause after the first round; doubled after each further one, jittered."""
MAX_PARALLEL = 2
"""Files at once: a node's uplink is rarely faster with more."""

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
        self._slots = asyncio.Semaphore(MAX_PARALLEL)
        self._running: set[Download] = set()
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
            if not self._store.has(digest):
                await self._bring(digest, size)
            return self._store.path(digest)

    async def document(self, path: str, *, enough: Callable[[bytes], bool] = bool) -> bytes:
        """A small signed document at `path`, at most MAX_DOCUMENT_BYTES, from the first source whose answer is `enough`.

        A mirror may be behind: when no answer is enough, the last one that came. `enough` is called outside the event loop.
        Raises Unavailable when none came.
        """
        answer, why = None, "no source is configured"
        for source in self._sources:
            request = Download(source.url + path, source.token, self._limits)

            def work(request: Download = request) -> tuple[bytes, bool]:
                data = request.read(MAX_DOCUMENT_BYTES)
                return data, enough(data)

            try:
                answer, done = await self._in_thread(request, MAX_DOCUMENT_BYTES, work)
            except (Unavailable, Malformed) as error:
                why = str(error)
                continue
            if done:
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
        request = Download(f"{source.url}/blobs/{digest}", source.token, self._limits)

        def work() -> None:
            staged = self._store.staging(digest)
            with taken(staged) as part:
                request.into(part, digest, size)
                # Published before the lock goes: from then on nobody has this inode open for writing.
                self._store.publish(digest, staged)

        async with self._slots:
            await self._in_thread(request, size, work)

    async def _in_thread(self, request: Download, size: int, work: Callable[[], T]) -> T:
        """Run `work`, whose transfer is cut when its time is over; when cancelled, cut it and wait for its thread."""
        seconds = self._limits.seconds(size)
        late = asyncio.get_running_loop().call_later(seconds, request.stop, f"not done within {seconds:.1f} s")
        self._running.add(request)
        try:
            future = _start(work)
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


def _start(work: Callable[[], T]) -> asyncio.Future[T]:
    """`work` in a daemon thread, which the end of the process does not wait for. Raises Unavailable when there is none."""
    outcome: Future[T] = Future()
    outcome.set_running_or_notify_cancel()

    def run() -> None:
        try:
            outcome.set_result(work())
        except BaseException as error:  # noqa: BLE001 - whatever it is, the caller waits for it
            outcome.set_exception(error)

    future = asyncio.wrap_future(outcome)
    try:
        Thread(target=run, name="fetch", daemon=True).start()
    except RuntimeError as error:
        raise Unavailable(f"no thread for a transfer: {error}") from error
    return future
