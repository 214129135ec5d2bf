"""A session that computes nothing: answers, fails, or waits in its thread until it is let go."""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from math import inf
from typing import Any

import numpy as np

from models.engines import Session
from models.manifest import Confidence
from models.serving.loaded import Identity, Loaded
from models.tensor import TensorSpec

WAIT_SECONDS = 10.0
X = TensorSpec("x", "FP32", (-1, 2))
Y = TensorSpec("y", "FP32", (-1, 2))


class FakeSession:
    """`y = value`, shaped like `x`. `gate`: while clear, a run waits. `error`: raised by every run while set."""

    serial = False

    def __init__(
        self, value: float = 1.0, inputs: Sequence[TensorSpec] = (X,), outputs: Sequence[TensorSpec] = (Y,)
    ) -> None:
        self.inputs, self.outputs = tuple(inputs), tuple(outputs)
        self.value = value
        self.gate = threading.Event()
        self.gate.set()
        self.started = threading.Semaphore(0)
        self.error: Exception | None = None
        self.asked: list[tuple[str, ...]] = []
        self.threads: list[str] = []
        self.running = self.most_running = 0
        self.closed_while_running = False
        self.closed = threading.Event()

    def run(self, inputs: Mapping[str, Any], outputs: Sequence[str]) -> list[Any]:
        self.running += 1
        self.most_running = max(self.most_running, self.running)
        self.asked.append(tuple(outputs))
        self.threads.append(threading.current_thread().name)
        self.started.release()
        try:
            if not self.gate.wait(WAIT_SECONDS):
                raise AssertionError("the gate was never opened")
            if self.error is not None:
                raise self.error
            shape = next(iter(inputs.values())).shape
            return [np.full(shape, self.value, np.float32) for _ in outputs or self.outputs]
        finally:
            self.running -= 1

    def stop(self) -> bool:
        return False

    def close(self) -> None:
        self.closed_while_running |= self.running > 0
        self.closed.set()


def loaded(
    session: Session, *, version: str = "1", inline: bool = False, confidence: Confidence | None = None
) -> Loaded:
    """A loaded version around `session`, run in the event loop or in a thread as told."""
    made = Loaded(Identity("fake", version, "fake"), session, confidence=confidence)
    made.inline_elements = 1 << 20 if inline else 0
    made.seconds = 1e-5 if inline else inf
    return made
