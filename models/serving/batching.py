"""Whether requests for a model are run together, and how many rows at once: measured when it is loaded.

Batching pays where the call costs more than the work: tiny dense and recurrent networks, seldom convolutional ones on a CPU.
Rows may only be run together when they do not influence each other; that is tried out before it is believed.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence

import msgspec
import numpy as np

from models.engines import Session
from models.errors import EngineFailure, InvalidRequest
from models.tensor import DTYPES, Array, TensorSpec

SIZES = (1, 2, 4, 8, 16, 32, 64, 128)
MIN_GAIN = 0.1
"""Share of a row's time that the next larger batch must save to be worth trying."""
MAX_SHARE = 0.9
"""A batch pays when a row in it takes at most this share of a row alone."""
LATENCY_SECONDS = 0.010
"""What a node promises to answer within; a batch may take a quarter of it."""
MEASURE_SECONDS = 1.0
"""Time that measuring one model may take."""
TRIALS = 5
_TRIED_ROWS = 4
_TOLERANCE = 1e-3
"""Relative to the largest output: what other kernels for other batch sizes may change (TF32-free CPU kernels stay below 1e-5;
quantised ones may move by one step)."""


class Batching(msgspec.Struct, frozen=True):
    """`rows`: most rows of one run, 1 = off. `reason`: why, in words for a person. `times`: rows -> seconds of one run."""

    rows: int
    reason: str
    times: Mapping[int, float] = {}


def not_batched(reason: str) -> Batching:
    return Batching(1, reason)


def measure_batching(
    session: Session,
    inputs: Sequence[TensorSpec],
    outputs: Sequence[TensorSpec],
    sample: Mapping[str, Array] | None,
    *,
    latency: float = LATENCY_SECONDS,
) -> Batching:
    """Try growing batches of `sample` (one row per input). Blocks for up to a second: in a thread, or before serving."""
    if sample is None:
        return not_batched("no inputs are known that it answers")
    obstacle = _obstacle(inputs, outputs)
    if obstacle:
        return not_batched(obstacle)
    try:
        if not rows_are_independent(session, sample):
            return not_batched("its rows influence each other when they are run together")
        times = _times(session, sample, latency / 4)
    except (EngineFailure, InvalidRequest, ValueError) as error:
        return not_batched(f"it refuses more than one row at once ({error})")
    return _decide(times, latency)


def _obstacle(inputs: Sequence[TensorSpec], outputs: Sequence[TensorSpec]) -> str:
    for kind, specs in (("input", inputs), ("output", outputs)):
        for spec in specs:
            if spec.shape[:1] != (-1,):
                return f"{kind} '{spec.name}' has no free first dimension"
            if spec.datatype == "BYTES":
                return f"{kind} '{spec.name}' is text"
    return "" if inputs else "it has no inputs"


def rows_are_independent(session: Session, sample: Mapping[str, Array]) -> bool:
    """Whether each of several different rows gets alone what it gets among the others."""
    feed = {name: _varied(array) for name, array in sample.items()}
    together = session.run(feed, ())
    for row in range(_TRIED_ROWS):
        alone = session.run({name: array[row : row + 1] for name, array in feed.items()}, ())
        for one, many in zip(alone, together, strict=True):
            if many.shape[:1] != (_TRIED_ROWS,) or not _same(one, many[row : row + 1]):
                return False
    return True


def _varied(array: Array) -> Array:
    """Different rows of the sample's kind. Whole numbers keep the sample's values, which may be indices, in other places."""
    rows = np.concatenate([array] * _TRIED_ROWS)
    if array.dtype.kind == "f":
        # A chirp: as good as noise here, and numpy.random need not be imported when a process starts.
        noise = np.sin(np.square(np.arange(1, rows.size + 1, dtype=np.float64))).reshape(rows.shape)
        return (rows + noise).astype(array.dtype)
    if rows.ndim > 1:
        for row in range(_TRIED_ROWS):
            rows[row] = np.roll(rows[row], row, axis=-1)
    return rows


def _same(one: Array, many: Array) -> bool:
    if one.shape != many.shape:
        return False
    if one.dtype.kind != "f":
        return bool(np.array_equal(one, many))
    scale = float(np.max(np.abs(one[np.isfinite(one)]), initial=1e-6))
    return bool(np.allclose(one, many, rtol=_TOLERANCE, atol=_TOLERANCE * scale, equal_nan=True))


def _times(session: Session, sample: Mapping[str, Array], most: float) -> dict[int, float]:
    times: dict[int, float] = {}
    ends = time.perf_counter() + MEASURE_SECONDS
    for rows in SIZES:
        feed = {name: np.concatenate([array] * rows) for name, array in sample.items()}
        session.run(feed, ())
        times[rows] = min(_timed(session, feed) for _ in range(TRIALS))
        if times[rows] > most or time.perf_counter() > ends:
            break
        previous = times.get(rows // 2)
        if previous is not None and times[rows] / 2 > (1 - MIN_GAIN) * previous:
            break
    return times


def _timed(session: Session, feed: Mapping[str, Array]) -> float:
    start = time.perf_counter()
    session.run(feed, ())
    return time.perf_counter() - start


def _decide(times: Mapping[int, float], latency: float) -> Batching:
    alone = times[1]
    fitting = [rows for rows in times if times[rows] <= latency / 4]
    best = min(fitting, key=lambda rows: times[rows] / rows, default=1)
    share = times[best] / best / alone
    if best == 1 or share > MAX_SHARE:
        largest = max(times)
        gain = alone * largest / times[largest]
        return Batching(1, f"{largest} rows at once are {gain:.2f}x as fast as one by one: not worth it", times)
    return Batching(best, f"a row among {best} takes {share:.0%} of a row alone ({1 / share:.1f}x)", times)


def blank(spec: TensorSpec) -> Array:
    """Zeros, or empty strings, of the smallest shape that `spec` allows."""
    shape = tuple(1 if dim == -1 else dim for dim in spec.shape)
    if spec.datatype == "BYTES":
        return np.full(shape, b"", np.object_)
    return np.zeros(shape, DTYPES[spec.datatype])
