"""A wait with an end, by a clock that tests can move."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Coroutine
from typing import Any, TypeVar

from sync.clock import Clock
from sync.errors import Unavailable

ABANDON_SECONDS = 5.0
"""How long work that was cancelled may take to end; then it is left alone."""

T = TypeVar("T")

log = logging.getLogger(__name__)


async def within(
    clock: Clock, seconds: float, what: str, work: Coroutine[Any, Any, T], *, late: Callable[[T], None] | None = None
) -> T:
    """The result of `work`. Raises Unavailable after `seconds`; then, or when cancelled, `work` is cancelled too.

    `late`: given what work returned to nobody: it would not be cancelled, or was over just when its caller was cancelled.
    """
    task = asyncio.ensure_future(work)
    alarm = asyncio.ensure_future(clock.sleep(seconds))
    try:
        await asyncio.wait({task, alarm}, return_when=asyncio.FIRST_COMPLETED)
    except asyncio.CancelledError:
        await _abandon(task, what, late)
        raise
    finally:
        alarm.cancel()
    if not task.done():
        await _abandon(task, what, late)
        raise Unavailable(f"{what} was not over within {seconds:g} s")
    return task.result()


async def _abandon(task: asyncio.Task[T], what: str, late: Callable[[T], None] | None) -> None:
    def ended(done: asyncio.Task[T]) -> None:
        if not done.cancelled() and done.exception() is None and late is not None:
            late(done.result())

    task.add_done_callback(ended)
    task.cancel()
    await asyncio.wait({task}, timeout=ABANDON_SECONDS)
    if not task.done():
        log.error("%s does not end and is left alone", what)
