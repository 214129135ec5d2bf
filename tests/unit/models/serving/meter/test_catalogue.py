"""The catalogue is true: everything in it is emitted and moves, nothing else can be, and its page is up to date."""

from __future__ import annotations

import asyncio
import gc
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from delivery_fakes import FakeDelivery
from meter_fakes import Clock, Index, Scripted, ask, numbers

from models.errors import NotFound
from models.serving.meter import resources
from models.serving.meter.catalogue import CATALOGUE, ENTRIES, Entry
from models.serving.meter.delivery import watch_member, watch_mirror
from models.serving.meter.document import render
from models.serving.meter.histogram import LAYOUTS
from models.serving.meter.meter import Meter
from models.serving.meter.registry import MAX_VALUES, Registry
from models.serving.meter.resources import watch_process, watching_loop
from models.serving.meter.sources import (
    OUTCOMES,
    watch_cache,
    watch_exporter,
    watch_guard,
    watch_memory,
    watch_queue,
    watch_router,
)
from models.serving.predictor import InferResponse

ROOT = Path(__file__).parents[5]
CLOSED = {"tier", "error", "reason", "outcome", "generation", "kind", "state", "way"}
"""Labels whose values are lists in our own code."""


class Parts:
    """Every component that keeps numbers for itself, as one."""

    def __init__(self) -> None:
        self.hits = self.misses = self.evictions = self.bytes = 0
        self.rejected_rate = self.rejected_concurrency = self.in_flight = 0
        self.up_suspended = False
        self.exported = self.dropped = 0
        self.loads = self.used = self.resident = 0
        self.pending = self.size = self.resent = 0
        self.waiting = self.backlog = self.connections = 0

    def use(self) -> Parts:
        return self

    def totals(self) -> dict[str, int]:
        return dict.fromkeys(OUTCOMES, self.pending)

    def __len__(self) -> int:
        return self.waiting

    def move(self) -> None:
        for name, value in vars(self).items():
            setattr(self, name, value + 1)


@contextmanager
def process_busy() -> Iterator[None]:
    """One thread, one descriptor and 64 MB more than before, and a second has passed."""
    done = threading.Event()
    thread = threading.Thread(target=done.wait, args=(10,))
    thread.start()
    memory = b"x" * (64 << 20)
    try:
        with Path(__file__).open():
            yield
    finally:
        del memory
        done.set()
        thread.join()


async def scenario(meter: Meter, inner: Scripted) -> None:
    """One of each: an answer, a degraded one, an error."""
    await meter.infer(ask())
    inner.answer = InferResponse(
        outputs={}, model="m", package="p", version="2", tier="edge", reason="up_late", degraded=True
    )
    await meter.infer(ask())
    inner.answer = NotFound("x")
    with pytest.raises(NotFound):
        await meter.infer(ask())


async def test_every_entry_is_emitted_and_moves(
    registry: Registry, scripted: Scripted, index: Index, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(resources, "LAG_SECONDS", 0.001)
    parts = Parts()
    meter = Meter(scripted, registry, index, tier="edge", clock=clock)
    watch_process(registry, clock)
    watch_cache(registry, parts)
    watch_guard(registry, parts)
    watch_router(registry, parts)
    watch_exporter(registry, parts)
    watch_queue(registry, parts)
    watch_memory(registry, parts)
    delivery = FakeDelivery(parts)
    watch_member(registry, delivery.member)
    watch_mirror(registry, delivery.mirror)
    await registry.refresh()
    registry.read("websocket.connections", lambda: parts.connections)
    before = numbers(registry)
    parts.move()
    delivery.move()
    await scenario(meter, scripted)
    gc.collect()
    for number in range(MAX_VALUES["model"] + 1):
        registry.counter("inference.request.degraded", model=f"m{number}")
    index.models["late"] = ((1,), ("1",))
    async with asyncio.timeout(5), watching_loop(registry):
        while not numbers(registry)["runtime.event_loop.lag"][()]:
            await asyncio.sleep(0)
    with process_busy():
        after = numbers(registry)
    assert set(after) == set(CATALOGUE)
    still = [name for name, series in after.items() if series == before.get(name, {})]
    assert still == []


@pytest.mark.parametrize("entry", ENTRIES, ids=lambda entry: entry.name)
def test_every_entry_says_what_it_is_and_what_to_do(entry: Entry) -> None:
    assert entry.kind in ("counter", "gauge", "histogram")
    assert entry.unit in ("s", "By", "1") or (entry.unit[0], entry.unit[-1]) == ("{", "}")
    assert entry.kind != "histogram" or entry.unit in LAYOUTS
    assert set(entry.labels) <= CLOSED | set(MAX_VALUES)
    for text in (entry.text, entry.bad):
        assert text[-1] == "."
        assert "|" not in text, "it would break the table of the page"


def test_no_name_is_there_twice() -> None:
    assert len(CATALOGUE) == len(ENTRIES)


def test_the_page_is_what_the_catalogue_says() -> None:
    assert (ROOT / "docs" / "metrics.md").read_text() == render(), (
        "python -m models.serving.meter.document > docs/metrics.md"
    )
