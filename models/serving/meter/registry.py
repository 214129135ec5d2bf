"""Where every counter, gauge and histogram of a process lives. Names come from the catalogue alone.

Components ask once for a handle, when a model is loaded or a connection is made, and keep it; nothing is looked up, formatted
or locked while a request is answered.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Sequence
from typing import TypeVar

import msgspec

from models.serving.meter.catalogue import CATALOGUE, Entry
from models.serving.meter.histogram import LAYOUTS, Histogram, Snapshot

MAX_VALUES = {"model": 64, "tenant": 64, "version": 128}
"""Different values that a label may have in one metric; what comes later is counted as `other`."""
MAX_OTHER_VALUES = 32
"""The same for labels that are not named above: their values are closed lists."""
MAX_SERIES = 512
"""Series of one metric: a scraper pays for each in every scrape."""
MAX_DROPPED = 1024
"""Series of one metric that are known to be counted as `other`; those beyond are not counted as dropped any more."""
MAX_LABEL_CHARS = 128
OTHER = "other"
REFRESH_SECONDS = 2.0
"""How long a scrape waits for what has to be looked up: a disk that hangs must not hide everything else."""

log = logging.getLogger(__name__)

Number = int | float
Source = Callable[[], "Number | None"]


class Counter:
    """A number that only grows. One thread may add to it."""

    __slots__ = ("value",)

    def __init__(self) -> None:
        self.value: Number = 0

    def add(self, amount: Number = 1) -> None:
        self.value += amount


class _Read:
    """A number that is kept elsewhere and asked for at each scrape: the sum of what the sources say."""

    __slots__ = ("sources",)

    def __init__(self) -> None:
        self.sources: list[Source] = []

    @property
    def value(self) -> Number | None:
        known = [number for source in self.sources if (number := source()) is not None]
        return sum(known) if known else None


_Series = Counter | _Read | Histogram
_Handle = TypeVar("_Handle", Counter, _Read, Histogram)
_Labels = tuple[str, ...]


class Family(msgspec.Struct, frozen=True):
    """One metric at one moment: its series as (label values, number or histogram)."""

    entry: Entry
    series: Sequence[tuple[_Labels, Number | Snapshot]]


class _Metric:
    def __init__(self, entry: Entry) -> None:
        self.entry = entry
        self.series: dict[_Labels, _Series] = {}
        self.seen: tuple[set[str], ...] = tuple(set() for _ in entry.labels)
        self.dropped: dict[_Labels, _Labels] = {}  # what was asked for -> where it is counted instead


class Registry:
    """The metrics of one process. Handles are asked for, and `collect` is called, in the event loop's thread."""

    def __init__(self) -> None:
        self._metrics: dict[str, _Metric] = {}
        self._before: list[Callable[[], None]] = []
        self._refreshes: list[Callable[[], Awaitable[object]]] = []
        self._refreshing: dict[Callable[[], Awaitable[object]], asyncio.Task[None]] = {}
        self.dropped_series = 0  # different ones, not how often they were asked for
        self.read("telemetry.series.dropped", lambda: self.dropped_series)

    def counter(self, name: str, **labels: str) -> Counter:
        """The counter with these labels, made when it is new. Raises ValueError unless the catalogue has it so."""
        return self._series(name, "counter", labels, Counter)

    def histogram(self, name: str, **labels: str) -> Histogram:
        """As `counter`."""
        return self._series(name, "histogram", labels, lambda: Histogram(LAYOUTS[CATALOGUE[name].unit]))

    def read(self, name: str, source: Source, **labels: str) -> None:
        """Show a gauge, or a counter kept elsewhere: `source` is called at each scrape, None = nothing to show now.

        Raises ValueError as `counter` does.
        """
        self._series(name, "", labels, _Read).sources.append(source)

    def retire(self, **labels: str) -> None:
        """Show no more what has these labels: what they name is gone for good. Its handles may still be counted on, unseen."""
        for metric in self._metrics.values():
            names = metric.entry.labels
            if not set(labels) <= set(names):
                continue
            for key in [key for key in metric.series if all(key[names.index(name)] == labels[name] for name in labels)]:
                del metric.series[key]
            for name, seen in zip(names, metric.seen, strict=True):
                if name in labels and all(key[names.index(name)] != labels[name] for key in metric.series):
                    seen.discard(labels[name])

    def before_collect(self, act: Callable[[], None]) -> None:
        """Call `act` before each scrape."""
        self._before.append(act)

    def before_scrape(self, act: Callable[[], Awaitable[object]]) -> None:
        """Await `act` in each `refresh`: it looks up what cannot be read without waiting, for sources to show."""
        self._refreshes.append(act)

    async def refresh(self) -> None:
        """To be awaited before `collect`. What takes longer than `REFRESH_SECONDS` goes on, and a later scrape shows it."""
        for act in self._refreshes:
            if act not in self._refreshing:
                self._refreshing[act] = asyncio.create_task(self._look(act), name="metrics")
        if self._refreshing:
            await asyncio.wait(list(self._refreshing.values()), timeout=REFRESH_SECONDS)

    async def _look(self, act: Callable[[], Awaitable[object]]) -> None:
        try:
            await act()
        except Exception:
            log.debug("a metric could not be looked up", exc_info=True)
        finally:
            del self._refreshing[act]

    def collect(self) -> list[Family]:
        """Everything there is, in the catalogue's order."""
        for act in self._before:
            act()
        return [
            Family(entry, _numbers(self._metrics[name])) for name, entry in CATALOGUE.items() if name in self._metrics
        ]

    def _series(self, name: str, kind: str, labels: dict[str, str], make: Callable[[], _Handle]) -> _Handle:
        metric = self._metric(name, kind, labels)
        key = self._key(metric, labels)
        series = metric.series.get(key)
        if series is None:
            series = metric.series[key] = make()
        elif isinstance(series, Counter) is not (make is Counter):
            raise ValueError(f"metric {name!r} is kept both here and elsewhere")
        return series  # type: ignore[return-value]

    def _metric(self, name: str, kind: str, labels: dict[str, str]) -> _Metric:
        entry = CATALOGUE.get(name)
        if entry is None or (entry.kind != kind if kind else entry.kind == "histogram"):
            raise ValueError(f"the catalogue has no {kind or 'counter or gauge'} {name!r}")
        if set(labels) != set(entry.labels):
            raise ValueError(f"metric {name!r} has the labels {', '.join(entry.labels) or 'none'}")
        metric = self._metrics.get(name)
        if metric is None:
            metric = self._metrics[name] = _Metric(entry)
        return metric

    def _key(self, metric: _Metric, labels: dict[str, str]) -> _Labels:
        """The labels' values in order, those beyond a cap replaced by `other`."""
        names = metric.entry.labels
        wanted = tuple(labels[name][:MAX_LABEL_CHARS] for name in names)
        if wanted in metric.series:
            return wanted
        if wanted in metric.dropped:
            return metric.dropped[wanted]
        key = tuple(
            value if value in seen or len(seen) < MAX_VALUES.get(name, MAX_OTHER_VALUES) else OTHER
            for name, value, seen in zip(names, wanted, metric.seen, strict=True)
        )
        if len(metric.series) >= MAX_SERIES and key not in metric.series:
            key = (OTHER,) * len(names)
        if key != wanted and len(metric.dropped) < MAX_DROPPED:
            metric.dropped[wanted] = key
            self.dropped_series += 1
        for value, seen in zip(key, metric.seen, strict=True):
            if value != OTHER:
                seen.add(value)
        return key


def _numbers(metric: _Metric) -> list[tuple[_Labels, Number | Snapshot]]:
    found: list[tuple[_Labels, Number | Snapshot]] = []
    for labels, series in metric.series.items():
        number = series.snapshot() if isinstance(series, Histogram) else series.value
        if number is not None:
            found.append((labels, number))
    return found
