"""The process's own figures, and the lag of its event loop."""

from __future__ import annotations

import asyncio
import gc
from typing import Any

import pytest
from meter_fakes import Clock, numbers

from models.serving.meter import resources
from models.serving.meter.registry import Registry
from models.serving.meter.resources import LoopWatch, watch_process, watching_loop


class Loop:
    """Calls back when told to."""

    def __init__(self) -> None:
        self.pending: list[Any] = []

    def call_later(self, delay: float, act: Any, *values: Any) -> Any:
        assert delay == 1.0
        self.pending.append((act, values))
        return self

    def cancel(self) -> None:
        self.pending.clear()

    def fire(self) -> None:
        ((act, values),) = self.pending
        self.pending.clear()
        act(*values)


def test_the_process_is_measured_when_it_is_scraped(registry: Registry, clock: Clock) -> None:
    watch_process(registry, clock)
    clock.now += 12.5
    before = numbers(registry)
    gc.collect()
    with open(__file__), open(__file__):
        after = numbers(registry)
    assert before["process.uptime"] == {(): 12.5}
    assert 1e6 < before["process.memory.usage"][()] < 1e11  # type: ignore[operator]
    assert before["process.thread.count"][()] >= 1  # type: ignore[operator]
    assert after["process.cpu.time"][()] > before["process.cpu.time"][()] > 0.0  # type: ignore[operator]
    name = "process.unix.file_descriptor.count"
    assert after[name][()] - before[name][()] == 2  # type: ignore[operator]
    assert after["cpython.gc.collections"]["2",] > before["cpython.gc.collections"]["2",]  # type: ignore[operator]


def test_a_system_without_procfs_leaves_out_what_it_cannot_know(
    registry: Registry, monkeypatch: pytest.MonkeyPatch, tmp_path: Any
) -> None:
    monkeypatch.setattr(resources, "_PROC", tmp_path)
    watch_process(registry)
    found = numbers(registry)
    assert found["process.memory.usage"] == found["process.unix.file_descriptor.count"] == {}
    assert found["process.thread.count"][()] >= 1  # type: ignore[operator]


def test_a_loop_that_is_held_shows_as_lag(registry: Registry, clock: Clock) -> None:
    loop = Loop()
    histogram = registry.histogram("runtime.event_loop.lag")
    watch = LoopWatch(loop, histogram, clock)  # type: ignore[arg-type]
    watch.start()
    for late in (0.0, 0.2, -0.001):
        clock.now += 1.0 + late
        loop.fire()
    snapshot = histogram.snapshot()
    assert (snapshot.count, snapshot.total) == (3, pytest.approx(0.2))
    watch.stop()
    assert not loop.pending


async def test_the_loop_is_watched_while_the_context_lasts(registry: Registry, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(resources, "LAG_SECONDS", 0.001)
    async with asyncio.timeout(5), watching_loop(registry):
        while not numbers(registry)["runtime.event_loop.lag"][()]:
            await asyncio.sleep(0)
