"""The registry: names of the catalogue alone, handles that stay, labels that cannot flood it."""

from __future__ import annotations

import asyncio

import pytest
from meter_fakes import numbers

from models.serving.meter import registry as registry_module
from models.serving.meter.registry import MAX_DROPPED, MAX_LABEL_CHARS, MAX_SERIES, MAX_VALUES, Registry


def test_the_same_labels_give_the_same_handle(registry: Registry) -> None:
    first = registry.counter("inference.request.errors", model="m", error="not_found")
    first.add()
    registry.counter("inference.request.errors", error="not_found", model="m").add(2)
    assert first.value == 3


@pytest.mark.parametrize(
    ("kind", "name", "labels", "message"),
    [
        ("counter", "inference.made.up", {}, "no counter 'inference.made.up'"),
        ("counter", "inference.queue.depth", {}, "no counter 'inference.queue.depth'"),
        ("counter", "inference.batch.size", {"model": "m", "version": "1", "tier": "edge"}, "no counter"),
        ("histogram", "inference.request.count", {"model": "m", "version": "1", "tier": "edge"}, "no histogram"),
        ("counter", "inference.request.errors", {"model": "m"}, "has the labels model, error"),
        ("counter", "inference.model.evictions", {"model": "m"}, "has the labels none"),
    ],
)
def test_only_what_the_catalogue_has_can_be_counted(
    registry: Registry, kind: str, name: str, labels: dict[str, str], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        getattr(registry, kind)(name, **labels)


def test_a_histogram_cannot_be_read_from_elsewhere(registry: Registry) -> None:
    with pytest.raises(ValueError, match="no counter or gauge"):
        registry.read("runtime.event_loop.lag", lambda: 1)


def test_a_metric_is_kept_here_or_elsewhere_but_not_both(registry: Registry) -> None:
    registry.counter("inference.model.evictions")
    with pytest.raises(ValueError, match="both here and elsewhere"):
        registry.read("inference.model.evictions", lambda: 1)
    registry.read("inference.cache.hits", lambda: 1)
    with pytest.raises(ValueError, match="both here and elsewhere"):
        registry.counter("inference.cache.hits")


def test_sources_of_one_series_are_added_up_and_those_without_a_number_are_left_out(registry: Registry) -> None:
    registry.read("process.memory.usage", lambda: None)
    assert numbers(registry)["process.memory.usage"] == {}
    registry.read("process.memory.usage", lambda: 3)
    registry.read("process.memory.usage", lambda: 4)
    assert numbers(registry)["process.memory.usage"] == {(): 7}


def test_label_values_beyond_the_cap_are_counted_as_other(registry: Registry) -> None:
    for number in range(MAX_VALUES["model"] + 5):
        registry.counter("inference.request.degraded", model=f"m{number}").add()
    series = numbers(registry)["inference.request.degraded"]
    assert len(series) == MAX_VALUES["model"] + 1
    assert series["other",] == 5
    assert numbers(registry)["telemetry.series.dropped"] == {(): 5}
    registry.counter("inference.request.degraded", model="m0").add()
    assert numbers(registry)["inference.request.degraded"]["m0",] == 2


def test_a_series_that_is_not_shown_is_counted_once_however_often_it_is_used(registry: Registry) -> None:
    for number in range(MAX_VALUES["model"] + 2):
        for _ in range(3):
            registry.counter("router.decision.count", model=f"m{number}", reason="x").add()
    assert registry.dropped_series == 2
    assert numbers(registry)["router.decision.count"]["other", "x"] == 6


def test_series_that_are_not_shown_cost_a_bounded_amount(registry: Registry) -> None:
    for number in range(MAX_DROPPED + 200):
        registry.counter("router.decision.count", model=f"m{number}", reason="x").add()
    assert registry.dropped_series == MAX_DROPPED
    assert numbers(registry)["router.decision.count"]["other", "x"] == MAX_DROPPED + 200 - MAX_VALUES["model"]


def test_combinations_of_labels_are_bounded_too(registry: Registry) -> None:
    for model in range(60):
        for version in range(60):
            registry.counter("inference.request.count", model=f"m{model}", version=str(version), tier="edge").add()
    series = numbers(registry)["inference.request.count"]
    assert len(series) == MAX_SERIES + 1
    assert sum(series.values()) == 3600  # type: ignore[arg-type]
    assert series["other", "other", "other"] == 3600 - MAX_SERIES


def test_a_long_label_is_cut(registry: Registry) -> None:
    registry.counter("inference.request.degraded", model="x" * 10_000).add()
    assert list(numbers(registry)["inference.request.degraded"]) == [("x" * MAX_LABEL_CHARS,)]


async def test_a_look_up_that_hangs_is_begun_once_and_hides_nothing_else(
    registry: Registry, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(registry_module, "REFRESH_SECONDS", 0.01)
    go, begun, seen = asyncio.Event(), [], []

    async def hang() -> None:
        begun.append(1)
        await go.wait()
        seen.append(1)

    async def fail() -> None:
        raise OSError

    registry.before_scrape(fail)
    registry.before_scrape(hang)
    await asyncio.gather(*(registry.refresh() for _ in range(5)))
    await registry.refresh()
    assert (len(begun), seen) == (1, [])
    go.set()
    await registry.refresh()
    assert seen == [1]
    await registry.refresh()
    assert len(begun) == 2
