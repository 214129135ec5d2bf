"""Ends a run that holds the event loop: the loop cannot do that itself, so a thread watches it."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable

from models.serving.loaded import Loaded

log = logging.getLogger("tierline.local")

LIMIT_SECONDS = 1.0
"""A run in the event loop is expected to take 0.2 ms; one that takes this long is stopped, and its model leaves the loop."""
LOOK_SECONDS = 0.25


class LoopWatch:
    """`running`: what runs in the loop now and since when, set and cleared by the loop; one assignment each."""

    def __init__(self, clock: Callable[[], float] = time.monotonic, limit: float = LIMIT_SECONDS) -> None:
        self.running: tuple[Loaded, float] | None = None
        self._clock = clock
        self._limit = limit
        self._thread: threading.Thread | None = None
        self._closed = threading.Event()

    def begin(self) -> None:
        """Watch from now on."""
        if self._thread is None and not self._closed.is_set():
            self._thread = threading.Thread(target=self._watch, name="tierline-watch", daemon=True)
            self._thread.start()

    def close(self) -> None:
        self._closed.set()

    def _watch(self) -> None:
        while not self._closed.wait(min(LOOK_SECONDS, self._limit)):
            running = self.running
            if running is None or self._clock() - running[1] <= self._limit:
                continue
            loaded = running[0]
            loaded.inline_elements = 0
            loaded.stops += 1
            stopped = loaded.session.stop()
            log.error("%s has held the event loop for more than %g s: %s", loaded.identity, self._limit,
                      "stopped" if stopped else "it cannot be stopped")  # fmt: skip
