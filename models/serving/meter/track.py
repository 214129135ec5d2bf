"""What is counted of one model version answering from one tier, for the metrics and for Triton's statistics."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

import numpy as np

from models.serving.index import Duration
from models.serving.meter.histogram import FOLD, Histogram
from models.serving.meter.registry import Registry


class Track:
    """`rowed`: the input whose first dimension counts rows, None = each request is one. `last`: monotonic seconds of the
    last answer, None = none yet. `runs`: of the engine; a request's share of a run is its share of the rows. All but `last`
    is up to date after `fold`."""

    __slots__ = (
        "_batch", "_batches", "_compute", "_computes", "_count", "_hits", "_misses", "_queue", "_queues", "_row_count",
        "_rows", "_whole", "_wholes", "computed", "hit", "last", "missed", "queued", "rowed", "rows", "runs", "success",
    )  # fmt: skip

    def __init__(self, registry: Registry, rowed: str | None, **labels: str) -> None:
        self._count = registry.counter("inference.request.count", **labels)
        self._row_count = registry.counter("inference.request.rows", **labels)
        self._whole: Final = registry.histogram("inference.request.e2e.duration", **labels)
        self._queue: Final = registry.histogram("inference.request.queue.duration", **labels)
        self._compute: Final = registry.histogram("inference.request.compute.duration", **labels)
        self._batch: Final = registry.histogram("inference.batch.size", **labels)
        self._wholes: list[float] = []
        self._queues: list[float] = []
        self._computes: list[float] = []
        self._batches: list[float] = []
        self._hits: list[float] = []
        self._misses: list[float] = []
        self._rows = 0
        self.rowed = rowed
        self.rows = 0
        self.runs = 0.0
        self.last: float | None = None
        self.success = Duration()
        self.queued = Duration()
        self.computed = Duration()
        self.hit = Duration()
        self.missed = Duration()

    def add(self, now: float, seconds: float, timings: Mapping[str, float], rows: int, batch: int) -> None:
        """Count one answer given at `now`, of `rows` of the `batch` rows that were run together."""
        self.last = now
        self._rows += rows
        compute = timings.get("compute")
        if compute is not None:
            self._computes.append(compute)
            self._queues.append(timings.get("queue", 0.0))
            self._batches.append(batch)
            self.runs += rows / batch if batch > rows else 1.0
        if "cache" in timings:
            (self._hits if compute is None else self._misses).append(timings["cache"])
        wholes = self._wholes
        wholes.append(seconds)
        if len(wholes) >= FOLD:
            self.fold()

    def fold(self) -> None:
        """Sort what was added into the histograms."""
        if not self._wholes:
            return
        self._count.add(len(self._wholes))
        self._row_count.add(self._rows)
        self.rows += self._rows
        self._rows = 0
        _move(self._wholes, self._whole, self.success)
        _move(self._queues, self._queue, self.queued)
        _move(self._computes, self._compute, self.computed)
        _move(self._batches, self._batch, Duration())
        _move(self._hits, None, self.hit)
        _move(self._misses, None, self.missed)


def _move(values: list[float], histogram: Histogram | None, duration: Duration) -> None:
    if values:
        array = np.array(values, np.float64)
        values.clear()
        duration.count += len(array)
        duration.ns += int(array.sum() * 1e9)
        if histogram is not None:
            histogram.add(array)
