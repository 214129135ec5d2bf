"""One rate for all transfers of a node together, which may change while they run. Safe to call from any thread."""

from __future__ import annotations

import time
from collections.abc import Callable
from math import inf
from threading import Lock

BURST_SECONDS = 0.25
"""What was not used counts for this long: a pause must not be followed by a flood."""

MIN_CHUNK = 1024


class Pace:
    """`rate`: bytes per second, None = no limit."""

    def __init__(self, rate: float | None = None, clock: Callable[[], float] = time.monotonic) -> None:
        self._rate = rate
        self._clock = clock
        self._lock = Lock()
        self._free_at = -inf

    @property
    def rate(self) -> float | None:
        return self._rate

    def limit(self, rate: float | None) -> None:
        """From now on, also for transfers under way."""
        with self._lock:
            self._rate = rate
            self._free_at = min(self._free_at, self._clock())

    def chunk(self, most: int) -> int:
        """How much to ask for at once, so that no wait is long."""
        rate = self._rate
        return most if rate is None else min(most, max(MIN_CHUNK, int(rate * BURST_SECONDS)))

    def take(self, size: int) -> float:
        """`size` bytes came: how many seconds to wait before the next ones are asked for."""
        with self._lock:
            if self._rate is None:
                return 0.0
            now = self._clock()
            self._free_at = max(self._free_at, now - BURST_SECONDS) + size / self._rate
            return max(0.0, self._free_at - now)
