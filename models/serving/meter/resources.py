"""What the process takes from its machine, read when it is scraped, and how late its event loop is."""

from __future__ import annotations

import asyncio
import gc
import os
import threading
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path

from models.serving.meter.histogram import Histogram
from models.serving.meter.registry import Registry

LAG_SECONDS = 1.0
"""Between two looks at the event loop."""
_PROC = Path("/proc/self")
_PAGE = os.sysconf("SC_PAGE_SIZE")


def watch_process(registry: Registry, clock: Callable[[], float] = time.monotonic) -> None:
    """Show processor time, memory, threads, descriptors, uptime and collections. `clock`: monotonic seconds.

    Where the system has no procfs, memory and descriptors are not shown.
    """
    start = clock()
    registry.read("process.cpu.time", time.process_time)
    registry.read("process.memory.usage", _resident_bytes)
    registry.read("process.thread.count", lambda: _entries("task") or threading.active_count())
    registry.read("process.unix.file_descriptor.count", lambda: _entries("fd"))
    registry.read("process.uptime", lambda: clock() - start)
    for generation in range(3):
        registry.read("cpython.gc.collections", _collections(generation), generation=str(generation))


@asynccontextmanager
async def watching_loop(registry: Registry, clock: Callable[[], float] = time.monotonic) -> AsyncIterator[None]:
    """Measure the event loop's lag while the context lasts."""
    watch = LoopWatch(asyncio.get_running_loop(), registry.histogram("runtime.event_loop.lag"), clock)
    watch.start()
    try:
        yield
    finally:
        watch.stop()


class LoopWatch:
    """One timer that notes how late it is, again and again."""

    def __init__(self, loop: asyncio.AbstractEventLoop, histogram: Histogram, clock: Callable[[], float]) -> None:
        self._loop = loop
        self._histogram = histogram
        self._clock = clock
        self._timer: asyncio.TimerHandle | None = None

    def start(self) -> None:
        # Not the loop's own clock: uvloop's stands still while something holds the loop.
        self._timer = self._loop.call_later(LAG_SECONDS, self._look, self._clock() + LAG_SECONDS)

    def stop(self) -> None:
        if self._timer is not None:
            self._timer.cancel()

    def _look(self, due: float) -> None:
        self._histogram.observe(max(self._clock() - due, 0.0))
        self.start()


def _resident_bytes() -> int | None:
    try:
        # proc(5), /proc/pid/statm: the second number is resident pages.
        return int((_PROC / "statm").read_text().split()[1]) * _PAGE
    except OSError:
        return None


def _entries(folder: str) -> int | None:
    try:
        return len(os.listdir(_PROC / folder))
    except OSError:
        return None


def _collections(generation: int) -> Callable[[], int]:
    return lambda: gc.get_stats()[generation]["collections"]
