"""Start a coroutine by hand: one that finishes at once costs no Task and no Future.

Most inferences are answered without suspending (a small model in the loop, a cache hit, a refusal). Their first step is
taken here, inside the caller's own turn of the loop; only a coroutine that suspends is continued in a Task.
"""

from __future__ import annotations

import asyncio
import types
from collections.abc import Callable, Coroutine, Generator
from typing import Any, TypeVar

T = TypeVar("T")

Done = Callable[[T | None, BaseException | None], None]
"""Called exactly once: (result, None), or (None, error) where a cancelled coroutine's error is CancelledError."""


def drive(coroutine: Coroutine[Any, Any, T], done: Done[T], loop: asyncio.AbstractEventLoop) -> asyncio.Task[T] | None:
    """Run `coroutine`; `done` is called before this returns (None), or later from the returned Task.

    The first step runs outside any task and in the caller's context: up to its first suspension the coroutine must not
    ask for the current task (`asyncio.timeout` does) nor set a context variable that it resets later.
    """
    try:
        waiting = coroutine.send(None)
    except StopIteration as stop:
        done(stop.value, None)
        return None
    except (Exception, asyncio.CancelledError) as error:  # noqa: BLE001 - delivered, as a Task delivers it
        done(None, error)
        return None
    continuation = _continue(coroutine, waiting)
    # Taken to its first yield now, so that a cancellation that comes before the Task's first step enters the coroutine.
    continuation.send(None)
    task = loop.create_task(continuation)
    task.add_done_callback(lambda ended: _deliver(ended, done))
    return task


async def _continue(coroutine: Coroutine[Any, Any, T], waiting: object) -> T:
    return await _rest(coroutine, waiting)


@types.coroutine
def _rest(coroutine: Coroutine[Any, Any, T], waiting: Any) -> Generator[Any, Any, T]:
    """Yield to the Task what the first step yielded to us, then let the coroutine talk to the Task itself."""
    # A future marks itself as awaited, and only the Task that it reaches unmarks it: unmarked here, because other tasks may
    # await it before ours begins, and marked again below, when ours has.
    _mark(waiting, False)
    begun = False
    try:
        while True:
            if begun:
                _mark(waiting, True)
            try:
                yield waiting if begun else None
            except BaseException as error:  # noqa: BLE001 - a cancellation or the future's error: the coroutine's to see
                waiting = coroutine.throw(error)
            else:
                if begun:
                    return (yield from coroutine)  # type: ignore[no-any-return]
            begun = True
    except StopIteration as stop:
        return stop.value  # type: ignore[no-any-return]


def _mark(waiting: Any, awaited: bool) -> None:
    # asyncio.sleep(0) yields None; everything else that asyncio lets a coroutine yield is a future.
    if waiting is not None:
        waiting._asyncio_future_blocking = awaited


def _deliver(task: asyncio.Task[T], done: Done[T]) -> None:
    if task.cancelled():
        done(None, asyncio.CancelledError())
        return
    error = task.exception()
    if error is not None:
        done(None, error)
    else:
        done(task.result(), None)
