"""The second level of the cache in Redis or Valkey. It can be lost at any time without costing an answer."""

from __future__ import annotations

import asyncio
import logging
import random
import time
from collections.abc import Callable
from typing import Any

from models.errors import CallerError
from models.serving.cache.record import CorruptRecord, decode_record, encode_record
from models.serving.predictor import InferResponse

log = logging.getLogger("tierline.cache.redis")

TIMEOUT_SECONDS = 0.05
"""Longest wait for the server; what takes longer than that, most models answer sooner."""
MAX_VALUE_BYTES = 1024 * 1024
"""Largest answer that is stored or read: within the timeout on a slow network."""
MAX_WRITES = 64
"""Writes under way at once; more answers are not stored."""
FAILURES_TO_OPEN = 3
FIRST_PAUSE_SECONDS = 1.0
MAX_PAUSE_SECONDS = 30.0


def connect(url: str, *, timeout: float, connections: int) -> Any:
    """A client of the server at `url` (redis://, rediss:// or unix://) that waits at most `timeout` seconds for anything.

    Nothing is connected yet, nothing is tried twice. Raises ModuleNotFoundError naming what to install, ValueError for a URL.
    """
    try:
        import redis.asyncio as client
        from redis.asyncio.retry import Retry
        from redis.backoff import NoBackoff
    except ImportError as error:
        raise ModuleNotFoundError("Redis and Valkey need the package redis: pip install 'tierline[redis]'") from error
    pool: Any = client.BlockingConnectionPool.from_url(
        url,
        max_connections=connections,
        timeout=timeout,
        socket_timeout=timeout,
        socket_connect_timeout=timeout,
        retry=Retry(NoBackoff(), 0),
    )
    return client.Redis.from_pool(pool)


class Outage:
    """Whether a server is left alone because it does not answer: after 3 failures in a row, for 1 s, then 2, up to 30.

    Each pause is shortened at random by up to a half, so that many processes do not come back at once. After it one call
    is let through: its success ends the outage.
    """

    def __init__(self, clock: Callable[[], float], uniform: Callable[[float, float], float] = random.uniform) -> None:
        self._clock = clock
        self._uniform = uniform
        self._failures = 0
        self._until = 0.0

    @property
    def is_open(self) -> bool:
        return self._failures >= FAILURES_TO_OPEN

    def allows(self) -> bool:
        """Whether a call may be made now. During an outage, asking takes the one call that is allowed."""
        if not self.is_open:
            return True
        if self._clock() < self._until:
            return False
        self._pause()
        return True

    def succeeded(self) -> bool:
        """True when this ended an outage."""
        ended, self._failures = self.is_open, 0
        return ended

    def failed(self) -> bool:
        """True when this began an outage."""
        began = self._failures + 1 == FAILURES_TO_OPEN
        self._failures = min(self._failures + 1, 64)  # keeps the power below small
        if self.is_open:
            self._pause()
        return began

    def _pause(self) -> None:
        longest = min(FIRST_PAUSE_SECONDS * 2.0 ** (self._failures - FAILURES_TO_OPEN), MAX_PAUSE_SECONDS)
        self._until = self._clock() + self._uniform(longest / 2, longest)


class RedisCache:
    """`SecondLevel` in the server at `url`. Keys are `<namespace>:<hex>`; each value lives `ttl` seconds.

    `errors`: calls that failed; `dropped`: answers not stored because too many writes were under way.
    """

    def __init__(
        self,
        url: str,
        *,
        namespace: str = "tierline:cache",
        ttl: float = 3600.0,
        max_value_bytes: int = MAX_VALUE_BYTES,
        timeout: float = TIMEOUT_SECONDS,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Raises ModuleNotFoundError without the package redis, ValueError for a URL it cannot use."""
        self.errors = 0
        self.dropped = 0
        self._client = connect(url, timeout=timeout, connections=16)
        self._prefix = namespace.encode() + b":"
        self._ttl_ms = max(1, round(ttl * 1e3))
        self._max_value_bytes = max_value_bytes
        self._timeout = timeout
        self._outage = Outage(clock)
        self._writes: set[asyncio.Task[Any]] = set()

    async def get(self, key: bytes) -> InferResponse | None:
        """What is stored under `key`; None when nothing is, it is corrupt (then it is deleted), or the server is down."""
        name = self._name(key)
        data = await self._call(lambda: self._client.getrange(name, 0, self._max_value_bytes))
        if not data or len(data) > self._max_value_bytes:
            return None
        try:
            return decode_record(key, data)
        except CorruptRecord as error:
            log.warning("a cached answer was corrupt and is deleted: %s", error)
            self._write(lambda: self._client.delete(name))
            return None

    def put(self, key: bytes, answer: InferResponse) -> None:
        """Store it in the background, unless it is too large, the server is down or too many writes are under way."""
        if sum(array.nbytes for array in answer.outputs.values()) > self._max_value_bytes:
            return
        try:
            data = encode_record(key, answer)
        except CallerError:
            return
        if len(data) <= self._max_value_bytes:
            self._write(lambda: self._client.set(self._name(key), data, px=self._ttl_ms))

    async def close(self) -> None:
        """Give up writes under way and close the connections."""
        for write in tuple(self._writes):
            write.cancel()
        if self._writes:
            await asyncio.wait(tuple(self._writes), timeout=1.0)
        await self._client.aclose()

    def _name(self, key: bytes) -> bytes:
        return self._prefix + key.hex().encode()

    def _write(self, call: Callable[[], Any]) -> None:
        if len(self._writes) >= MAX_WRITES:
            self.dropped += 1
            return
        task = asyncio.get_running_loop().create_task(self._call(call))
        self._writes.add(task)
        task.add_done_callback(self._writes.discard)

    async def _call(self, call: Callable[[], Any]) -> Any:
        """The answer to one command, None when there is none in time."""
        if not self._outage.allows():
            return None
        try:
            answer = await asyncio.wait_for(call(), self._timeout)
        except Exception as error:  # noqa: BLE001 - whatever the client raises, an answer must not depend on it
            self.errors += 1
            if self._outage.failed():
                log.warning(
                    "the shared cache does not answer (%s): it is left alone for a while",
                    str(error) or type(error).__name__,
                )
            return None
        if self._outage.succeeded():
            log.info("the shared cache answers again")
        return answer
