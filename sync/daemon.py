"""Blocking work in a thread that nobody has to wait for: neither a cancelled caller nor the end of the process."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable
from concurrent.futures import Future
from contextlib import suppress
from threading import Thread, get_native_id
from typing import TypeVar

from sync.errors import Unavailable

NICENESS = 15
"""Of such a thread: behind those that run models (10). Hashing 100 MB must cost no request anything."""

T = TypeVar("T")


def in_daemon(work: Callable[[], T], name: str) -> asyncio.Future[T]:
    """What `work` returns or raises, from a thread called `name`. Raises Unavailable when there is no thread to be had."""
    outcome: Future[T] = Future()
    outcome.set_running_or_notify_cancel()

    def run() -> None:
        with suppress(OSError):
            # On Linux a thread has a nice value of its own.
            os.setpriority(os.PRIO_PROCESS, get_native_id(), NICENESS)
        try:
            outcome.set_result(work())
        except BaseException as error:  # noqa: BLE001 - whatever it is, the caller waits for it
            outcome.set_exception(error)

    future = asyncio.wrap_future(outcome)
    try:
        Thread(target=run, name=name, daemon=True).start()
    except RuntimeError as error:
        raise Unavailable(f"no thread for {name}: {error}") from error
    return future
