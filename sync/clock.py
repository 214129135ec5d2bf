"""The only place that reads or waits on a clock. Everything else is handed a `Clock`, so tests can fake time."""

from __future__ import annotations

import asyncio
import os
import time
from pathlib import Path
from typing import Protocol

OFFSET_FILE = "TIERLINE_CLOCK_OFFSET_FILE"
"""Test hook: names a file that holds seconds to add to the wall clock, read at every call, so that it can jump while a
program runs. Whoever sets a program's environment could replace the program as well: this gives nobody a right."""
MAX_OFFSET_TEXT = 64


class Clock(Protocol):
    def wall(self) -> float:
        """Unix seconds: for stamps and expiry, never for durations."""
        ...

    def monotonic(self) -> float:
        """Seconds from an arbitrary start: for durations and deadlines."""
        ...

    async def sleep(self, seconds: float) -> None:
        """Return after `seconds` of this clock."""
        ...


class SystemClock:
    """The machine's clock. Raises ValueError when the test hook's file does not hold a number."""

    def __init__(self) -> None:
        self._offset_file = os.environ.get(OFFSET_FILE)

    def wall(self) -> float:
        return time.time() + (_offset(self._offset_file) if self._offset_file else 0.0)

    def monotonic(self) -> float:
        return time.monotonic()

    async def sleep(self, seconds: float) -> None:
        await asyncio.sleep(seconds)


def _offset(path: str) -> float:
    try:
        return float(Path(path).read_text()[:MAX_OFFSET_TEXT] or 0.0)
    except OSError as error:
        raise ValueError(f"{OFFSET_FILE}: {error}") from error
