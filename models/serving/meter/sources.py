"""Counters that components keep for themselves as plain numbers, shown as metrics. One line each in an assembly."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Protocol

from models.serving.meter.registry import Registry


class CacheNumbers(Protocol):
    """A result cache; `bytes`: what its answers take."""

    @property
    def hits(self) -> int: ...
    @property
    def misses(self) -> int: ...
    @property
    def evictions(self) -> int: ...
    @property
    def bytes(self) -> int: ...


class GuardNumbers(Protocol):
    """What limits requests before any work."""

    @property
    def rejected_rate(self) -> int: ...
    @property
    def rejected_concurrency(self) -> int: ...
    @property
    def in_flight(self) -> int: ...


class Breaker(Protocol):
    """A router with a tier above it."""

    @property
    def up_suspended(self) -> bool: ...


class QueueNumbers(Protocol):
    """Runs that wait for an engine thread; `backlog`: seconds of engine time they will take."""

    def __len__(self) -> int: ...
    @property
    def backlog(self) -> float: ...


class MemoryNumbers(Protocol):
    """`used`: bytes; `resident`: versions in memory; `loads`, `evictions`: so far."""

    @property
    def used(self) -> int: ...
    @property
    def resident(self) -> int: ...
    @property
    def loads(self) -> int: ...
    @property
    def evictions(self) -> int: ...


class Residents(Protocol):
    """What keeps models within a memory budget."""

    def use(self) -> MemoryNumbers: ...


class ExporterNumbers(Protocol):
    """What sends spans to a collector."""

    @property
    def exported(self) -> int: ...
    @property
    def dropped(self) -> int: ...


class OutboxNumbers(Protocol):
    """What keeps events until the hub has them. `totals`: outcome -> events so far."""

    @property
    def pending(self) -> int: ...
    @property
    def size(self) -> int: ...
    @property
    def resent(self) -> int: ...
    def totals(self) -> Mapping[str, int]: ...


OUTCOMES = ("enqueued", "delivered", "expired", "dropped.quota", "dropped.disk", "dropped.overrun", "dropped.refused")


def watch_outbox(registry: Registry, outbox: OutboxNumbers) -> None:
    registry.read("outbox.event.pending", lambda: outbox.pending)
    registry.read("outbox.event.size", lambda: outbox.size)
    registry.read("outbox.event.resends", lambda: outbox.resent)
    for outcome in OUTCOMES:
        registry.read("outbox.event.outcomes", partial(_outcome, outbox, outcome), outcome=outcome)


def _outcome(outbox: OutboxNumbers, outcome: str) -> int:
    return outbox.totals().get(outcome, 0)


def watch_cache(registry: Registry, cache: CacheNumbers) -> None:
    registry.read("inference.cache.hits", lambda: cache.hits)
    registry.read("inference.cache.misses", lambda: cache.misses)
    registry.read("inference.cache.evictions", lambda: cache.evictions)
    registry.read("inference.cache.size", lambda: cache.bytes)


def watch_guard(registry: Registry, guard: GuardNumbers) -> None:
    registry.read("inference.request.rejected", lambda: guard.rejected_rate, reason="rate")
    registry.read("inference.request.rejected", lambda: guard.rejected_concurrency, reason="concurrency")
    registry.read("inference.request.active", lambda: guard.in_flight)


def watch_router(registry: Registry, router: Breaker) -> None:
    registry.read("router.breaker.state", lambda: int(router.up_suspended))


def watch_queue(registry: Registry, queue: QueueNumbers) -> None:
    registry.read("inference.queue.depth", lambda: len(queue))
    registry.read("inference.queue.work", lambda: queue.backlog)


def watch_memory(registry: Registry, models: Residents) -> None:
    registry.read("inference.model.resident", lambda: models.use().resident)
    registry.read("inference.model.memory.usage", lambda: models.use().used)
    registry.read("inference.model.loads", lambda: models.use().loads)
    registry.read("inference.model.evictions", lambda: models.use().evictions)


def watch_exporter(registry: Registry, exporter: ExporterNumbers) -> None:
    registry.read("telemetry.spans.exported", lambda: exporter.exported)
    registry.read("telemetry.spans.dropped", lambda: exporter.dropped)
