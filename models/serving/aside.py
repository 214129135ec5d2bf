"""Work that must not cost a request anything: loading and measuring a version beside those that serve."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

from models.serving.cores import LOADING_NICE, give_way

T = TypeVar("T")


async def aside(work: Callable[[], T]) -> T:
    """What `work` returns, from a thread of its own that gives way to all others. Loads are rare: the thread is not kept."""
    thread = loading_threads(1)
    try:
        return await asyncio.get_running_loop().run_in_executor(thread, work)
    finally:
        thread.shutdown(wait=False)


def loading_threads(count: int) -> ThreadPoolExecutor:
    """At most `count` threads that give way to all others."""
    return ThreadPoolExecutor(count, thread_name_prefix="load", initializer=give_way, initargs=(LOADING_NICE,))
