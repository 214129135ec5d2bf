"""One version of a model, ready to run: its session and what every request needs to know of it, worked out once."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from math import inf
from statistics import median

from msgspec import structs

from models.contract import is_finite
from models.engines import Session
from models.errors import EngineFailure, InvalidRequest
from models.manifest import Confidence
from models.serving.batching import Batching, blank, measure_batching, not_batched
from models.tensor import DTYPES, Array, TensorSpec

INLINE_SECONDS = 0.0002
"""Longest run that may hold the event loop (0.2 ms); anything longer goes to a thread, so it cannot stall fast models."""
MEASURE_RUNS = 7
MEASURE_SECONDS = 0.25
"""A slow model is measured once or twice, not seven times."""
CLEAN_ANSWERS = 20
"""Answers in a row without a failure after which a version counts as good, and its outputs are no longer looked through."""
SAMPLE_SECONDS = 1.0
"""Least time between two runs of the sample after failures: callers the engine refuses may not double its work."""
SAMPLE_SHARE = 0.1
"""Largest share of a thread that such runs may take, for a model slow enough to feel them."""
MAX_SAMPLE_BYTES = 64 * 1024
"""Largest inputs of a caller that are kept as the sample of a version that came without one."""
MAX_REASON = 300
"""Characters of an engine's message that a caller is shown: it may quote whole tensors."""
MAX_RUN_SECONDS = 60.0
"""A run that takes longer is stopped, and its request is answered before."""
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
    """A loaded version. Everything but `session.run` and `refuse` belongs to the event loop's thread: no locks.

    `seconds`: of one warm single-row run. `inline_elements`: requests of at most this many input elements run in the
    event loop, 0 = none. `expected`: per input (name, dtype, whether it has free rows, shape of a row, spec).
    `in_flight`: runs that were asked for and are not over; `in_threads`: those of other threads. `pace`: seconds that a row
    takes, as lately seen. `batching`: how many rows may be run together, and why. `fresh_shapes`: whether rows may differ in
    shape. `alone`: turns of the loop in a row that brought one request; `turn`: the last one that did. `max_run_seconds`: a
    run that takes longer is stopped; `stops`: how
    often that was done; `stuck`: one could not be. `used`: when it was last asked, monotonic seconds.
    """

    __slots__ = (
        "_sample", "_sample_due", "_sample_runs", "alone", "answers", "batching", "clean", "confidence", "expected",
        "failures", "fresh_shapes", "identity", "in_flight", "in_threads", "inline_elements", "inputs", "max_run_seconds",
        "on_idle", "output_names", "outputs", "pace", "retired", "row_elements", "seconds", "serial", "session",
        "stops", "stuck", "turn", "used",
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
        max_rows: int | None = None,
        max_run_seconds: float = MAX_RUN_SECONDS,
    ) -> None:
        """Measures the session: blocks for up to a second or two.

        `inputs`, `outputs`: the manifest's, () = the session's.

        `sample`: inputs that the session answers, to measure with and to try again when others fail; None = none known.
        `max_rows`: of one batch, 1 = never batch, None = as measured.
        """
        self.identity = identity
        self.session = session
        self.inputs = tuple(inputs or session.inputs)
        self.outputs = tuple(outputs or session.outputs)
        self.output_names = tuple(spec.name for spec in self.outputs)
        self.expected = tuple(
            (spec.name, DTYPES[spec.datatype], spec.shape[:1] == (-1,), spec.shape[1:], spec) for spec in self.inputs
        )
        self.confidence = confidence
        self.fresh_shapes = any(-1 in spec.shape[1:] for spec in self.inputs)
        self.seconds = inf if sample is None else measure(session, sample)
        self.pace = 0.0 if sample is None else self.seconds
        self.batching = _batching(session, self.inputs, self.outputs, sample, self.seconds, max_rows)
        self.row_elements = sum(array.size for array in sample.values()) if sample else 0
        self.inline_elements = self._inline_elements()
        self.alone = 0
        self.turn = -1
        self.used = 0.0
        self.stuck = False
        self.stops = 0
        self.max_run_seconds = max_run_seconds
        self._sample = sample
        self._sample_due = 0.0
        self._sample_runs = sample is not None
        self.serial = session.serial
        self.in_flight = self.in_threads = 0
        self.retired = False
        self.on_idle: Callable[[Loaded], None] | None = None
        self.watch()

    def _inline_elements(self) -> int:
        """Input elements whose run is expected to stay within the limit, from the largest batch that was measured."""
        if self.seconds > INLINE_SECONDS:
            return 0
        rows, seconds = 1, self.seconds
        for tried, took in self.batching.times.items():
            if took <= INLINE_SECONDS and tried > rows:
                rows, seconds = tried, took
        return int(rows * self.row_elements * INLINE_SECONDS / max(seconds, 1e-9))

    @property
    def inline(self) -> bool:
        """Whether a single row may run in the event loop."""
        return self.inline_elements > 0

    def runs_here(self, elements: int) -> bool:
        """Whether a request of this many input elements is short enough to run in the event loop now."""
        return elements <= self.inline_elements and not (self.serial and self.in_threads)

    def watch(self) -> None:
        """Forget the traffic so far: from here on the version is on probation."""
        self.answers = self.failures = self.clean = 0

    def answered(self, inputs: Mapping[str, Array], outputs: Sequence[Array]) -> None:
        """Count an answer; while on probation one that is not finite counts as a failure.

        Not when the caller's inputs were not finite either: that says nothing about the model.
        """
        if self.clean < CLEAN_ANSWERS and not all(is_finite(array) for array in outputs):
            if all(is_finite(array) for array in inputs.values()):
                self.failed()
            return
        self.answers += 1
        self.clean += 1

    def refuse(self, error: EngineFailure) -> None:
        """After a failed run: raise InvalidRequest when the session still answers its sample, so that the inputs are to blame.

        Any thread may call. What the last try of the sample gave holds for a second, or ten times the time that it took.
        """
        start = time.monotonic()
        if self._sample is not None and start >= self._sample_due:
            self._sample_due = inf  # no other thread tries meanwhile
            try:
                self.session.run(self._sample, ())
                self._sample_runs = True
            except EngineFailure:
                self._sample_runs = False
            finally:
                ended = time.monotonic()
                self._sample_due = ended + max(SAMPLE_SECONDS, (ended - start) / SAMPLE_SHARE)
        if self._sample_runs:
            raise InvalidRequest(f"the model refuses these inputs: {str(error)[:MAX_REASON]}") from error

    def learn(self, inputs: Mapping[str, Array]) -> None:
        """These were answered: they become the sample of a version that came without one, unless they are large."""
        if self._sample is None and sum(array.nbytes for array in inputs.values()) <= MAX_SAMPLE_BYTES:
            self._sample = {name: array.copy() for name, array in inputs.items()}

    def failed(self) -> None:
        self.answers += 1
        self.failures += 1
        self.clean = 0

    @property
    def is_trusted(self) -> bool:
        """Whether its outputs are no longer looked through."""
        return self.clean >= CLEAN_ANSWERS

    @property
    def is_bad(self) -> bool:
        return self.failures >= MIN_FAILURES and self.failures > MAX_FAILURE_SHARE * self.answers

    def acquire(self) -> None:
        """A run was asked for that is not made at once."""
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


def _batching(
    session: Session,
    inputs: Sequence[TensorSpec],
    outputs: Sequence[TensorSpec],
    sample: Mapping[str, Array] | None,
    seconds: float,
    max_rows: int | None,
) -> Batching:
    if max_rows == 1:
        return not_batched("switched off")
    if seconds > MEASURE_SECONDS:
        return not_batched("a single row takes too long")
    measured = measure_batching(session, inputs, outputs, sample)
    if max_rows is not None and measured.rows > max_rows:
        return structs.replace(measured, rows=max_rows, reason=f"{measured.reason}; limited to {max_rows} rows")
    return measured


def first_row(specs: Sequence[TensorSpec], arrays: Mapping[str, Array]) -> dict[str, Array]:
    """The first row of every input that has rows: those whose first dimension is -1. Copied: the rest need not stay."""
    batched = {spec.name for spec in specs if spec.shape[:1] == (-1,)}
    return {name: array[:1].copy() if name in batched else array for name, array in arrays.items()}


def blank_row(specs: Sequence[TensorSpec]) -> dict[str, Array]:
    """Zeros (empty strings for BYTES) of the smallest shape that `specs` allow."""
    return {spec.name: blank(spec) for spec in specs}
