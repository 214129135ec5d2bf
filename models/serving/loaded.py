"""One version of a model, ready to run: its session and what every request needs to know of it, worked out once."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from math import inf
from statistics import median

import numpy as np

from models.contract import is_finite
from models.engines import Session
from models.manifest import Confidence
from models.tensor import DTYPES, Array, TensorSpec

INLINE_SECONDS = 0.0002
"""Longest run that may hold the event loop (0.2 ms); anything longer goes to a thread, so it cannot stall fast models."""
MEASURE_RUNS = 7
MEASURE_SECONDS = 0.25
"""A slow model is measured once or twice, not seven times."""
CLEAN_ANSWERS = 20
"""Answers in a row without a failure after which a version counts as good, and its outputs are no longer looked through."""
MIN_FAILURES = 5
MAX_FAILURE_SHARE = 0.2


@dataclass(frozen=True)
class Identity:
    """What makes two loaded versions the same one. `digest`: of the manifest, `variant`: of the file; "" = unsigned."""

    package: str
    version: str
    engine: str
    precision: str = ""
    digest: str = ""
    variant: str = ""

    @property
    def platform(self) -> str:
        return f"{self.engine}_{self.precision}" if self.precision else self.engine

    def __str__(self) -> str:
        return f"{self.package}/{self.version}"


class Loaded:
    """A loaded version. Everything but `session.run` belongs to the event loop's thread: no locks.

    `seconds`: of one warm single-row run. `inline_elements`: requests of at most this many input elements run in the
    event loop, 0 = none. `expected`: per input (name, dtype, whether it has free rows, shape of a row, spec).
    `in_flight`: runs under way in other threads.
    """

    __slots__ = (
        "_serial", "answers", "clean", "confidence", "expected", "failures", "identity", "in_flight", "inline_elements",
        "inputs", "on_idle", "output_names", "outputs", "retired", "seconds", "session",
    )  # fmt: skip

    def __init__(
        self,
        identity: Identity,
        session: Session,
        *,
        inputs: Sequence[TensorSpec] = (),
        outputs: Sequence[TensorSpec] = (),
        confidence: Confidence | None = None,
        sample: Mapping[str, Array] | None = None,
    ) -> None:
        """`inputs`, `outputs`: the manifest's, () = the session's. `sample`: inputs to measure with, None = do not measure."""
        self.identity = identity
        self.session = session
        self.inputs = tuple(inputs or session.inputs)
        self.outputs = tuple(outputs or session.outputs)
        self.output_names = tuple(spec.name for spec in self.outputs)
        self.expected = tuple(
            (spec.name, DTYPES[spec.datatype], spec.shape[:1] == (-1,), spec.shape[1:], spec) for spec in self.inputs
        )
        self.confidence = confidence
        self.seconds = inf if sample is None else measure(session, sample)
        elements = sum(array.size for array in sample.values()) if sample else 0
        self.inline_elements = int(elements * INLINE_SECONDS / self.seconds) if self.seconds <= INLINE_SECONDS else 0
        self._serial = session.serial
        self.in_flight = 0
        self.retired = False
        self.on_idle: Callable[[Loaded], None] | None = None
        self.watch()

    @property
    def inline(self) -> bool:
        """Whether a single row may run in the event loop."""
        return self.inline_elements > 0

    def runs_here(self, elements: int) -> bool:
        """Whether a request of this many input elements is short enough to run in the event loop now."""
        return elements <= self.inline_elements and not (self._serial and self.in_flight)

    def watch(self) -> None:
        """Forget the traffic so far: from here on the version is on probation."""
        self.answers = self.failures = self.clean = 0

    def answered(self, outputs: Sequence[Array]) -> None:
        """Count an answer; while on probation one that is not finite counts as a failure."""
        if self.clean < CLEAN_ANSWERS and not all(is_finite(array) for array in outputs):
            self.failed()
            return
        self.answers += 1
        self.clean += 1

    def failed(self) -> None:
        self.answers += 1
        self.failures += 1
        self.clean = 0

    @property
    def is_bad(self) -> bool:
        return self.failures >= MIN_FAILURES and self.failures > MAX_FAILURE_SHARE * self.answers

    def acquire(self) -> None:
        """A run starts in another thread."""
        self.in_flight += 1

    def release(self) -> None:
        """That run is over, whether or not anyone still waits for it."""
        self.in_flight -= 1
        if self.retired and self.in_flight == 0 and self.on_idle is not None:
            self.on_idle(self)

    def retire(self, on_idle: Callable[[Loaded], None]) -> None:
        """No new run will come: call `on_idle` once those under way are over, now when there are none."""
        if self.retired:
            return
        self.retired, self.on_idle = True, on_idle
        if self.in_flight == 0:
            on_idle(self)


def measure(session: Session, sample: Mapping[str, Array]) -> float:
    """Median seconds of a warm run of `sample`."""
    session.run(sample, ())
    times: list[float] = []
    while len(times) < MEASURE_RUNS and sum(times) < MEASURE_SECONDS:
        start = time.perf_counter()
        session.run(sample, ())
        times.append(time.perf_counter() - start)
    return max(median(times), 1e-9)


def first_row(specs: Sequence[TensorSpec], arrays: Mapping[str, Array]) -> dict[str, Array]:
    """The first row of every input that has rows: those whose first dimension is -1."""
    batched = {spec.name for spec in specs if spec.shape[:1] == (-1,)}
    return {name: array[:1] if name in batched else array for name, array in arrays.items()}


def blank_row(specs: Sequence[TensorSpec]) -> dict[str, Array]:
    """Zeros (empty strings for BYTES) of the smallest shape that `specs` allow."""
    row: dict[str, Array] = {}
    for spec in specs:
        shape = tuple(1 if dim == -1 else dim for dim in spec.shape)
        row[spec.name] = (
            np.full(shape, b"", np.object_) if spec.datatype == "BYTES" else np.zeros(shape, DTYPES[spec.datatype])
        )
    return row
