"""One version that can be asked for: loaded, or known how to load."""

from __future__ import annotations

from collections.abc import Callable

from models.serving.loaded import Loaded

Opener = Callable[[bool], Loaded]
"""Loads and warms a version, in a thread. Told whether its batching was measured before and need not be again."""
STUCK = "it is stuck in a run that cannot be stopped"


class Registered:
    """What is known of a version whether or not it is loaded just now. Belongs to the event loop.

    `loaded`: None while it is not in memory. `cost`: bytes. `loaded_at`: monotonic seconds; `load_seconds`: what its last
    loading took. `problem`: why it could not be loaded again, and not before `retry_at`. `gone`: served no more.
    `latency_ms`: what its contract promises, None = nothing.
    """

    __slots__ = (
        "_inline_elements", "_opener", "attempts", "batching", "confidence", "cost", "gone", "identity", "inputs",
        "latency_ms", "load_seconds", "loaded", "loaded_at", "name", "outputs", "problem", "retry_at",
    )  # fmt: skip

    def __init__(self, name: str, loaded: Loaded, *, opener: Opener | None = None, cost: int = 0) -> None:
        """`opener`: None = it stays in memory for as long as it is served."""
        self.name = name
        self.identity = loaded.identity
        self.inputs = loaded.inputs
        self.outputs = loaded.outputs
        self.confidence = loaded.confidence
        self.batching = loaded.batching
        self.loaded: Loaded | None = loaded
        self.cost = cost
        self.loaded_at = 0.0
        self.load_seconds = 0.0
        self.problem = ""
        self.retry_at = 0.0
        self.attempts = 0
        self.gone = False
        self.latency_ms: float | None = None
        self._opener = opener
        self._inline_elements = loaded.inline_elements

    @property
    def opener(self) -> Opener:
        if self._opener is None:
            raise RuntimeError(f"'{self.name}' ({self.identity}) stays in memory: nothing may have evicted it")
        return self._opener

    @property
    def is_idle(self) -> bool:
        """Whether it could be evicted now."""
        return self.loaded is not None and self._opener is not None and self.loaded.in_flight == 0

    @property
    def is_ready(self) -> bool:
        """Whether it can answer: now, or once it is loaded again, which worked the last time."""
        return not self.why_not_ready

    @property
    def why_not_ready(self) -> str:
        """ "" when it can answer."""
        if self.loaded is None:
            return self.problem
        return STUCK if self.loaded.stuck else ""

    def last_used(self) -> float:
        """Monotonic seconds; 0 while it is not loaded."""
        return 0.0 if self.loaded is None else max(self.loaded.used, self.loaded_at)

    def arrived(self, loaded: Loaded, now: float, seconds: float) -> None:
        """It is loaded again, which took `seconds`: what its traffic and its first measuring taught still holds."""
        loaded.batching, loaded.inline_elements = self.batching, self._inline_elements
        self.loaded, self.loaded_at, self.load_seconds = loaded, now, seconds
        self.problem, self.retry_at, self.attempts = "", 0.0, 0

    def left(self) -> Loaded | None:
        """It is in memory no more. Returns what is to be closed."""
        loaded, self.loaded = self.loaded, None
        if loaded is not None:
            self.batching, self._inline_elements = loaded.batching, loaded.inline_elements
        return loaded
