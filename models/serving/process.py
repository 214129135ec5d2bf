"""Running a node as a process: event loop, signals, logs. Shared by every command that serves."""

from __future__ import annotations

import argparse
import asyncio
import gc
import json
import logging
import os
import signal
import sys
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractAsyncContextManager
from pathlib import Path

import msgspec

from models.serving.memory import keep_few_arenas

log = logging.getLogger("tierline.process")

MAX_PORT = 65_535

STOP_SECONDS = 30.0
"""Longest that everything may take to be closed in order: supervisors kill what is still there after 30 to 90 s."""
THREAD_SECONDS = 2.0
"""How long threads may go on once all is closed: nothing can break off a file that is being loaded."""
IDLE_SECONDS = 0.1
"""Within which a thread ends that has nothing left to do."""

SWITCH_INTERVAL_SECONDS = 0.0005
"""How long a Python thread may keep the interpreter from the event loop. With the default of 5 ms, one busy thread beside
serving takes p99 from 0.4 to 16 ms."""


GC_THRESHOLDS = (2_000, 20, 50)
"""Python's (700, 10, 10) suits short programs: a batch of requests alone makes hundreds of objects, none of them in cycles."""


class JsonLines(logging.Formatter):
    """One JSON object a line: time, level, logger, node, message and, for exceptions, the trace."""

    def __init__(self, node: str) -> None:
        super().__init__()
        self._node = node

    def format(self, record: logging.LogRecord) -> str:
        event: dict[str, object] = {
            "t": round(record.created, 3),
            "level": record.levelname.lower(),
            "log": record.name,
            "node": self._node,
            "msg": record.getMessage(),
        }
        if record.exc_info:
            event["trace"] = self.formatException(record.exc_info)
        return msgspec.json.encode(event).decode()


def port_number(text: str) -> int:
    """A TCP port from a command line, 0 = chosen by the system. Raises argparse.ArgumentTypeError."""
    if not text.isdecimal() or int(text[:9]) > MAX_PORT:
        raise argparse.ArgumentTypeError(f"{text!r} is not a port, 0 to {MAX_PORT}")
    return int(text)


def configure_logging(node: str, level: int = logging.INFO) -> None:
    """Send everything to standard error, one structured line per event."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonLines(node))
    logging.basicConfig(level=level, handlers=[handler], force=True)


def announce(path: Path, **facts: object) -> None:
    """Write what others need to know of a started process (its URL, its id) in one piece, for scripts that wait for it."""
    staged = path.with_suffix(f".{os.getpid()}.tmp")
    staged.write_text(json.dumps({"pid": os.getpid(), **facts}))
    staged.replace(path)


class UnawaitedThreads(ThreadPoolExecutor):
    """A loop's default executor that does not hold up the end of the loop: what runs in a thread may never end."""

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
        super().shutdown(wait=False, cancel_futures=cancel_futures)


def run_until_stopped(start: Callable[[], AbstractAsyncContextManager[object]]) -> int:
    """Enter `start()` on uvloop, stay until SIGINT or SIGTERM, leave it in order. Returns the process's exit code.

    A signal while it is being entered breaks that off. The process ends `STOP_SECONDS` after the signal at the latest, and
    `THREAD_SECONDS` after everything was closed when a thread does not end: for processes that do nothing else.
    """
    import uvloop

    keep_few_arenas()
    sys.setswitchinterval(SWITCH_INTERVAL_SECONDS)
    before = set(threading.enumerate())
    stay = _Stay(start)
    status = 1
    try:
        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            runner.get_loop().set_default_executor(UnawaitedThreads(thread_name_prefix="tierline-work"))
            runner.run(stay.until_stopped())
        status = 0
    finally:
        if stay.last_resort is not None:
            stay.last_resort.cancel()
        _end_despite(before, status)
    return status


class _Stay:
    """`last_resort`: set off by the signal."""

    def __init__(self, start: Callable[[], AbstractAsyncContextManager[object]]) -> None:
        self.last_resort: threading.Timer | None = None
        self._start = start
        self._started = False
        self._stop = asyncio.Event()

    async def until_stopped(self) -> None:
        staying = asyncio.create_task(self._stay())
        for number in (signal.SIGINT, signal.SIGTERM):
            asyncio.get_running_loop().add_signal_handler(number, self._end, staying)
        await asyncio.wait((staying,))
        if not (staying.cancelled() and self._stop.is_set()):
            staying.result()

    async def _stay(self) -> None:
        async with self._start():
            self._started = True
            # What was made up to here stays: the collector need not look through it again and again under load.
            gc.collect()
            gc.freeze()
            gc.set_threshold(*GC_THRESHOLDS)
            await self._stop.wait()

    def _end(self, staying: asyncio.Task[None]) -> None:
        if self._stop.is_set():
            return
        self._stop.set()
        self.last_resort = _ending_after(STOP_SECONDS, "not everything was closed", status=1)
        if not self._started:
            staying.cancel()


def _end_despite(before: set[threading.Thread], status: int) -> None:
    """Let the interpreter, which waits for every thread that is no daemon, do so for `THREAD_SECONDS` only."""
    started = [each for each in threading.enumerate() if each not in before and not each.daemon]
    for each in started:
        each.join(IDLE_SECONDS)
    names = ", ".join(sorted({each.name for each in started if each.is_alive()}))
    if names:
        _ending_after(THREAD_SECONDS, f"work in threads did not end ({names})", status=status)


def _ending_after(seconds: float, reason: str, *, status: int) -> threading.Timer:
    """A thread that ends this process, without any cleaning up, unless it is gone or the timer is cancelled by then."""

    def end() -> None:
        log.warning("%s within %g s: the process ends without it", reason, seconds)
        os._exit(status)

    timer = threading.Timer(seconds, end)
    timer.daemon = True
    timer.start()
    return timer
