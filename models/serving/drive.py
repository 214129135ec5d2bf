"""Start a coroutine by hand: one that finishes at once costs no Task and no Future.

Most inferences are answered without suspending (a small model in the loop, a cache hit, a refusal). Their first step is
taken here, inside the caller's own turn of the loop. A coroutine that waits for a `Parked` (a place in a batch or in the
queue of a model) is continued by whoever gives that its result, again without a Task. Only one that suspends on anything
else is continued in a Task.
"""

from __future__ import annotations

import asyncio
import types
from collections.abc import Callable, Coroutine, Generator
from typing import Any, Generic, TypeVar

T = TypeVar("T")

Done = Callable[[T | None, BaseException | None], None]
"""Called exactly once: (result, None), or (None, error) where a cancelled coroutine's error is CancelledError."""


class Parked(Generic[T]):
    """A result to come, given by a call in the loop: `give` or `fail`, once; the first one counts.

    Awaited in a coroutine that `drive` started it costs one call; anywhere else it behaves as an asyncio.Future does.
    `on_cancel` is called when whoever waits has gone: the work may be dropped.
    """

    __slots__ = (
        "_asyncio_future_blocking",
        "_callbacks",
        "_done",
        "_error",
        "_loop",
        "_result",
        "_resume",
        "on_cancel",
    )

    def __init__(self, loop: asyncio.AbstractEventLoop, on_cancel: Callable[[], None] | None = None) -> None:
        self._asyncio_future_blocking = False
        self._loop = loop
        self._done = False
        self._result: T | None = None
        self._error: BaseException | None = None
        self._resume: Callable[[], None] | None = None
        self._callbacks: list[tuple[Callable[[Any], object], Any]] = []
        self.on_cancel = on_cancel

    def give(self, result: T) -> None:
        if not self._done:
            self._result = result
            self._finish()

    def fail(self, error: BaseException) -> None:
        if not self._done:
            self._error = error
            self._finish()

    def _finish(self) -> None:
        self._done = True
        resume, self._resume = self._resume, None
        if resume is not None:
            resume()
        for callback, context in self._callbacks:
            self._loop.call_soon(callback, self, context=context)
        self._callbacks.clear()

    def abandon(self) -> None:
        """Whoever waited has gone."""
        if not self._done:
            self._done = True
            self._error = asyncio.CancelledError()
            if self.on_cancel is not None:
                self.on_cancel()

    # --- what asyncio asks of a future ---------------------------------------------------------------------------------

    def __await__(self) -> Generator[Any, None, T]:
        if not self._done:
            self._asyncio_future_blocking = True
            yield self
        return self.result()

    __iter__ = __await__

    def result(self) -> T:
        if self._error is not None:
            raise self._error
        return self._result  # type: ignore[return-value]

    def exception(self) -> BaseException | None:
        return self._error

    def done(self) -> bool:
        return self._done

    def cancelled(self) -> bool:
        return isinstance(self._error, asyncio.CancelledError)

    def cancel(self, msg: object = None) -> bool:
        if self._done:
            return False
        self.abandon()
        self._finish()
        return True

    def get_loop(self) -> asyncio.AbstractEventLoop:
        return self._loop

    def add_done_callback(self, callback: Callable[[Any], object], *, context: Any = None) -> None:
        if self._done:
            self._loop.call_soon(callback, self, context=context)
        else:
            self._callbacks.append((callback, context))

    def remove_done_callback(self, callback: Callable[[Any], object]) -> int:
        kept = [each for each in self._callbacks if each[0] != callback]
        removed = len(self._callbacks) - len(kept)
        self._callbacks = kept
        return removed


class Driven(Generic[T]):
    """A coroutine under way: what `drive` returns for one that has suspended."""

    __slots__ = ("_coroutine", "_done", "_loop", "_parked", "_task")

    def __init__(self, coroutine: Coroutine[Any, Any, T], done: Done[T], loop: asyncio.AbstractEventLoop) -> None:
        self._coroutine = coroutine
        self._done = done
        self._loop = loop
        self._parked: Parked[Any] | None = None
        self._task: asyncio.Task[T] | None = None

    def cancel(self) -> None:
        """Throw CancelledError into the coroutine: now when it is parked, else in the next turn of the loop."""
        if self._task is not None:
            self._task.cancel()
            return
        parked, self._parked = self._parked, None
        if parked is not None:
            parked._resume = None
            parked.abandon()
            self._step()

    def _step(self) -> None:
        self._parked = None
        try:
            waiting = self._coroutine.send(None)
        except StopIteration as stop:
            self._done(stop.value, None)
        except (Exception, asyncio.CancelledError) as error:  # noqa: BLE001 - delivered, as a Task delivers it
            self._done(None, error)
        else:
            self._wait(waiting)

    def _wait(self, waiting: object) -> None:
        if type(waiting) is Parked:
            waiting._asyncio_future_blocking = False
            waiting._resume = self._step
            self._parked = waiting
            return
        continuation = _continue(self._coroutine, waiting)
        # Taken to its first yield now, so that a cancellation that comes before the Task's first step enters the coroutine.
        continuation.send(None)
        self._parked = None
        self._task = self._loop.create_task(continuation)
        self._task.add_done_callback(self._deliver)

    def _deliver(self, task: asyncio.Task[T]) -> None:
        if task.cancelled():
            self._done(None, asyncio.CancelledError())
            return
        error = task.exception()
        if error is not None:
            self._done(None, error)
        else:
            self._done(task.result(), None)


def drive(coroutine: Coroutine[Any, Any, T], done: Done[T], loop: asyncio.AbstractEventLoop) -> Driven[T] | None:
    """Run `coroutine`; `done` is called before this returns (None), or later, when what was returned has ended.

    Until it suspends on anything but a `Parked` the coroutine runs outside any task and in the caller's context: it must
    not ask for the current task (`asyncio.timeout` does) nor set a context variable that it resets later.
    """
    try:
        waiting = coroutine.send(None)
    except StopIteration as stop:
        done(stop.value, None)
        return None
    except (Exception, asyncio.CancelledError) as error:  # noqa: BLE001 - delivered, as a Task delivers it
        done(None, error)
        return None
    driven = Driven(coroutine, done, loop)
    if type(waiting) is Parked:
        waiting._asyncio_future_blocking = False
        waiting._resume = driven._step
        driven._parked = waiting
    else:
        driven._wait(waiting)
    return driven


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
