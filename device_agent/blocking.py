"""The agent for applications without an event loop: one background thread, stopped on leaving the block."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Coroutine, Iterator, Mapping, Sequence
from concurrent.futures import CancelledError
from contextlib import AbstractAsyncContextManager, contextmanager
from os import PathLike
from typing import Any, Self, TypeVar

from numpy.typing import ArrayLike

from device_agent.agent import Agent, Answer
from device_agent.config import AgentConfig
from models.errors import NotReady

T = TypeVar("T")

STOP_SECONDS = 10.0
"""Longest wait for the background thread to end."""


class BlockingAgent:
    """`Agent` for synchronous code; may be called from several threads at once."""

    def __init__(self, config: AgentConfig | str | PathLike[str]) -> None:
        self._agent = Agent(config)
        self._loop: asyncio.AbstractEventLoop | None = None
        self._thread: threading.Thread | None = None

    def __enter__(self) -> Self:
        loop = asyncio.new_event_loop()
        thread = threading.Thread(target=loop.run_forever, name="tierline-agent", daemon=True)
        thread.start()
        self._loop, self._thread = loop, thread
        try:
            self._call(self._agent.__aenter__())
        except BaseException:
            self._stop()
            raise
        return self

    def __exit__(self, *exc: object) -> None:
        try:
            self._call(self._agent.__aexit__(None, None, None))
        finally:
            self._stop()

    def infer(
        self,
        model: str,
        inputs: Mapping[str, ArrayLike],
        *,
        deadline_ms: float | None = None,
        min_confidence: float | None = None,
        outputs: Sequence[str] = (),
        version: str | None = None,
    ) -> Answer:
        """As `Agent.infer`, waiting for the answer."""
        return self._call(
            self._agent.infer(
                model,
                inputs,
                deadline_ms=deadline_ms,
                min_confidence=min_confidence,
                outputs=outputs,
                version=version,
            )
        )

    @contextmanager
    def hold(self, reason: str, timeout: float | None = None) -> Iterator[None]:
        """As `Agent.hold`, for a `with` block."""
        holding = self._agent.hold(reason, timeout)
        self._call(holding.__aenter__())
        try:
            yield
        finally:
            self._call(_left(holding))

    def event(
        self,
        kind: str,
        body: bytes | Mapping[str, object],
        *,
        priority: int | None = None,
        ttl: float | None = None,
    ) -> str:
        """As `Agent.event`, waiting until it is on the disk."""
        return self._call(self._agent.event(kind, body, priority=priority, ttl=ttl))

    def running(self) -> dict[str, str]:
        """Model name -> `package/version` served in this process."""
        return self._agent.running()

    @property
    def connected(self) -> bool:
        return self._agent.connected

    def wait_for(self, model: str, timeout: float = 30.0) -> None:
        """As `Agent.wait_for`."""
        self._call(self._agent.wait_for(model, timeout))

    def _call(self, work: Coroutine[Any, Any, T]) -> T:
        if self._loop is None:
            work.close()
            raise NotReady("the agent is not running: use it inside 'with BlockingAgent(...)'")
        call = asyncio.run_coroutine_threadsafe(work, self._loop)
        try:
            return call.result()
        except CancelledError:
            raise NotReady("the agent was stopped while this call was under way") from None
        except BaseException:
            call.cancel()  # an interrupted caller waits for nothing: neither should its call
            raise

    def _stop(self) -> None:
        loop, self._loop = self._loop, None
        if loop is None or self._thread is None:
            return
        try:
            asyncio.run_coroutine_threadsafe(_wind_up(loop), loop).result(STOP_SECONDS)
        finally:
            loop.call_soon_threadsafe(loop.stop)
            self._thread.join(STOP_SECONDS)
            if not self._thread.is_alive():
                loop.close()


async def _left(holding: AbstractAsyncContextManager[None]) -> None:
    await holding.__aexit__(None, None, None)


async def _wind_up(loop: asyncio.AbstractEventLoop) -> None:
    """End what is still under way, so that no caller waits for ever, and the threads that loading used."""
    left = asyncio.all_tasks(loop) - {asyncio.current_task(loop)}
    for task in left:
        task.cancel()
    if left:
        await asyncio.wait(left, timeout=STOP_SECONDS / 2)
    await loop.shutdown_default_executor()
