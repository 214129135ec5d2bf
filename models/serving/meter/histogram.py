"""Histograms whose hot path is one list append: values are sorted into buckets 256 at a time.

Buckets are those of OpenTelemetry's exponential histogram at scale 3 (edges 2^(k/8), each value within 4.4 % of its bucket's
middle, upper edge inclusive; "Exponential bucketing", OpenTelemetry metrics data model), split further at the round edges
that are exported, so that those are exact.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import Any

import numpy as np

FOLD = 256
"""Values kept before they are sorted in: 10 us of work then, 0.04 us a value."""
SCALE = 8
"""Buckets per doubling: scale 3."""

Values = np.ndarray[Any, np.dtype[np.float64]]
Counts = np.ndarray[Any, np.dtype[np.int64]]


class Layout:
    """Bucket edges from 2^`low` to 2^`high`. `exported`: edges that are exact and shown, ascending."""

    def __init__(self, low: int, high: int, exported: Sequence[float]) -> None:
        powers = 2.0 ** (np.arange(low * SCALE, high * SCALE + 1) / SCALE)
        # Not np.unique: it imports numpy.ma, which every start would wait for.
        self.edges: Values = np.array(sorted({*powers.tolist(), *exported}), np.float64)
        self.exported = tuple(exported)
        self.positions = np.searchsorted(self.edges, self.exported)


_FINE = (1e-5, 2.5e-5, 5e-5, 1e-4, 2.5e-4, 5e-4)
_COARSE = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 60.0)
SECONDS = Layout(-20, 6, (*_FINE, *_COARSE))
"""From 1 us to 64 s; 5, 10, 25, 50 and 100 ms, what is promised to callers, are among the exact edges."""
SIZES = Layout(0, 20, tuple(float(1 << power) for power in range(11)))
"""From 1 to a million things."""
LAYOUTS = {"s": SECONDS, "{row}": SIZES}


class Snapshot:
    """What a histogram held at one moment: `counts` per bucket of `layout`, the last one for what lies above; `total`: sum."""

    __slots__ = ("counts", "layout", "total")

    def __init__(self, layout: Layout, counts: Counts, total: float) -> None:
        self.layout = layout
        self.counts = counts
        self.total = total

    @property
    def count(self) -> int:
        return int(self.counts.sum())

    def cumulative(self) -> list[int]:
        """How many values were at most each exported edge."""
        return [int(each) for each in np.cumsum(self.counts)[self.layout.positions]]

    def quantile(self, share: float) -> float:
        """The value that `share` (0..1) of the values do not exceed, within 4.4 %. NaN when there are none."""
        running = np.cumsum(self.counts)
        if running[-1] == 0:
            return float("nan")
        bucket = int(np.searchsorted(running, max(share * running[-1], 1.0)))
        edges = self.layout.edges
        if bucket in (0, len(edges)):
            return float(edges[min(bucket, len(edges) - 1)])
        return float(np.sqrt(edges[bucket - 1] * edges[bucket]))


class Histogram:
    """A series of values. Any thread may `observe`."""

    __slots__ = ("_counts", "_layout", "_lock", "_pending", "_total")

    def __init__(self, layout: Layout) -> None:
        self._layout = layout
        self._counts: Counts = np.zeros(len(layout.edges) + 1, np.int64)
        self._total = 0.0
        self._pending: list[float] = []
        self._lock = threading.Lock()

    def observe(self, value: float) -> None:
        pending = self._pending
        pending.append(value)
        if len(pending) >= FOLD:
            self._fold()

    def add(self, values: Values) -> None:
        """Many at once."""
        with self._lock:
            self._sort_in(values)

    def snapshot(self) -> Snapshot:
        self._fold()
        with self._lock:
            return Snapshot(self._layout, self._counts.copy(), self._total)

    def _fold(self) -> None:
        with self._lock:
            pending = self._pending
            # Other threads append meanwhile: what they add stays for the next time.
            count = len(pending)
            if count:
                self._sort_in(np.array(pending[:count], np.float64))
                del pending[:count]

    def _sort_in(self, values: Values) -> None:
        counts = self._counts
        counts += np.bincount(np.searchsorted(self._layout.edges, values), minlength=len(counts))
        self._total += float(values.sum())
