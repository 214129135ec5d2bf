"""Answers given before, given again: a predictor that remembers what the one below it answered.

Opt-in per model. The key is (model digest, input bits, outputs wanted, tenant): one version never answers for another, one
tenant never for another. Degraded answers and errors are never kept. Identical requests that arrive while the first of them
runs wait for its answer, each until its own deadline; when that one fails or goes, they run themselves.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Collection, Coroutine
from typing import Any, Protocol

from msgspec.structs import replace

from models.errors import DeadlineExceeded, InvalidRequest, TierlineError
from models.serving.cache.identity import Identities
from models.serving.cache.key import request_key
from models.serving.cache.memory import Kept, Memory
from models.serving.drive import Parked
from models.serving.predictor import InferRequest, InferResponse, Predictor

log = logging.getLogger("tierline.cache")

DEFAULT_BYTES = 64 * 1024 * 1024
MAX_FOLLOWERS = 1024
"""Requests that may wait for one run of another; each holds its inputs in memory. More run themselves."""
MAX_WAIT_SECONDS = 60.0
"""Longest wait for another's run when the request carries no deadline; then it runs itself."""
NORMAL_PRIORITY = 2

Key = bytes


class SecondLevel(Protocol):
    """A cache that several processes share. It never raises, and gives up by itself within a bounded time."""

    async def get(self, key: Key) -> InferResponse | None: ...

    def put(self, key: Key, answer: InferResponse) -> None:
        """Keep it soon, or not at all; returns at once."""
        ...


class _Flight:
    """A run under way and who waits for it. `rank`: the urgency it runs with, lower is more urgent."""

    __slots__ = ("rank", "waiting")

    def __init__(self, rank: int) -> None:
        self.rank = rank
        self.waiting: list[Parked[Kept | None]] = []


class Cache:
    """`Predictor` around `inner`.

    `models`: the names that may be cached, or a function that says so. `budget`: bytes kept in this process. Counters:
    `hits` (of either level or of another's run), `misses`, `evictions`, `bytes`.
    """

    def __init__(
        self,
        inner: Predictor,
        identities: Identities,
        *,
        models: Collection[str] | Callable[[str], bool],
        budget: int = DEFAULT_BYTES,
        second: SecondLevel | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.hits = 0
        self.misses = 0
        self._inner = inner
        self._lookup = identities.lookup
        self._caches = models if callable(models) else frozenset(models).__contains__
        self._memory = Memory(budget)
        self._second = second
        self._clock = clock
        self._flights: dict[bytes, _Flight] = {}

    @property
    def evictions(self) -> int:
        return self._memory.evictions

    @property
    def bytes(self) -> int:
        return self._memory.bytes

    def clear(self) -> None:
        """Forget what this process keeps."""
        self._memory.clear()

    def infer(self, request: InferRequest) -> Coroutine[Any, Any, InferResponse]:
        """Raises what `inner` raises, or DeadlineExceeded for a request that waited for another's run."""
        # The other's own coroutine: one around it would be paid by every request of a model that is not cached.
        return self._infer(request) if self._caches(request.model) else self._inner.infer(request)

    async def _infer(self, request: InferRequest) -> InferResponse:
        start = self._clock()
        try:
            digest, lasting = self._lookup(request.model, request.version)
        except TierlineError:
            # Unknown, or not in memory just now: it is for whoever runs models to say so, or to load it.
            return await self._inner.infer(request)
        key = await request_key(digest, request)
        if key is None or (request.deadline is not None and request.deadline <= start):
            return await self._inner.infer(request)
        kept = self._memory.get(key)
        if kept is None:
            flight = self._flights.get(key)
            if flight is None:
                return await self._lead(request, key, digest, lasting, start)
            kept = await self._follow(flight, request)
            if kept is None:
                self.misses += 1
                return await self._inner.infer(request)
        self.hits += 1
        return kept.give(request.model, request.id, self._clock() - start)

    async def _lead(self, request: InferRequest, key: Key, digest: Key, lasting: bool, start: float) -> InferResponse:
        """Ask the second level, then the model, for this request and for those that come to wait."""
        flight = self._flights[key] = _Flight(_rank(request))
        kept: Kept | None = None
        try:
            second = self._second if lasting else None
            if second is not None:
                found = await self._ask(second, key, request, start)
                if found is not None:
                    kept = found
                    self._memory.put(key, kept)
                    self.hits += 1
                    return kept.give(request.model, request.id, self._clock() - start)
            self.misses += 1
            looked = self._clock() - start
            answer = await self._inner.infer(request)
            if not answer.degraded and self._is_still(request, digest):
                kept = self._keep(key, answer, bool(flight.waiting))
                if kept is not None and second is not None:
                    second.put(key, kept.answer)
            return replace(answer, timings={**answer.timings, "cache": looked})
        finally:
            del self._flights[key]
            if flight.waiting:
                # Not from here: those who wait would run inside this request's own step.
                asyncio.get_running_loop().call_soon(_land, flight.waiting, kept)

    async def _ask(self, second: SecondLevel, key: Key, request: InferRequest, start: float) -> Kept | None:
        # In a task of its own: clients of a socket ask for the current one, and ours may not have begun.
        asked = asyncio.get_running_loop().create_task(second.get(key))
        timeout = None if request.deadline is None else request.deadline - start
        try:
            await asyncio.wait((asked,), timeout=timeout)
        finally:
            if not asked.done():
                asked.cancel()
        answer = asked.result() if asked.done() and not asked.cancelled() else None
        return None if answer is None else Kept(answer)

    async def _follow(self, flight: _Flight, request: InferRequest) -> Kept | None:
        """What the run under way gave, None = run yourself. Raises DeadlineExceeded."""
        if len(flight.waiting) >= MAX_FOLLOWERS or _rank(request) < flight.rank:
            return None
        loop = asyncio.get_running_loop()
        parked: Parked[Kept | None] = Parked(loop)
        flight.waiting.append(parked)
        if request.deadline is None:
            timer = loop.call_later(MAX_WAIT_SECONDS, parked.give, None)
        else:
            late = DeadlineExceeded(f"'{request.model}' did not answer an identical request in time")
            timer = loop.call_later(request.deadline - self._clock(), parked.fail, late)
        try:
            return await parked
        finally:
            timer.cancel()

    def _is_still(self, request: InferRequest, digest: Key) -> bool:
        """Whether the version that was looked up still answers: it may have been swapped before the run began."""
        try:
            return self._lookup(request.model, request.version)[0] == digest
        except TierlineError:  # unloaded meanwhile: the answer stands, it is only not kept
            return False

    def _keep(self, key: Key, answer: InferResponse, wanted: bool) -> Kept | None:
        """A private copy of the answer, kept when it is not too large; None when nobody would use it."""
        size = sum([array.nbytes for array in answer.outputs.values()])
        if not wanted and not self._memory.takes(size):
            return None
        try:
            kept = Kept(answer)
        except InvalidRequest:
            return None
        self._memory.put(key, kept)
        return kept


def _rank(request: InferRequest) -> int:
    return request.priority or NORMAL_PRIORITY


def _land(waiting: list[Parked[Kept | None]], kept: Kept | None) -> None:
    for parked in waiting:
        parked.give(kept)
