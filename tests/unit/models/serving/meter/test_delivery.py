"""What reaches a node, as metrics: every series is there from the start, and their number does not grow."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
from delivery_fakes import FakeDelivery
from meter_fakes import numbers

from models.serving.meter import delivery
from models.serving.meter.delivery import watch_member, watch_mirror
from models.serving.meter.registry import Registry
from sync import download, traffic  # noqa: F401 - download adds error codes of its own
from sync.errors import SyncError
from sync.states import STATES


@pytest.fixture
def node(registry: Registry) -> FakeDelivery:
    made = FakeDelivery(SimpleNamespace(pending=0, size=0, resent=0, totals=dict))
    watch_member(registry, made.member)
    watch_mirror(registry, made.mirror)
    return made


def test_a_document_is_in_one_state(registry: Registry, node: FakeDelivery) -> None:
    node.report.state = "rolled_back"
    states = numbers(registry)["update.document.state"]
    assert states["desired", "rolled_back"] == 1
    assert sum(states.values()) == 1  # type: ignore[arg-type]
    assert len(states) == len(delivery.STATES)


def codes(error: type[SyncError] = SyncError) -> set[str]:
    return {error.code}.union(*map(codes, error.__subclasses__()))


def test_the_lists_are_those_of_the_control_plane_which_models_may_not_know() -> None:
    assert set(delivery.STATES) == set(STATES)
    assert set(delivery.WAYS) == {
        traffic.WHOLE,
        traffic.RESUMED,
        traffic.DELTA,
        traffic.BLOCKS,
        traffic.MEDIUM,
        traffic.METADATA,
    }
    assert {*delivery.CODES, *delivery.SOURCE_CODES} <= codes()


def test_a_code_that_nobody_foresaw_is_counted_as_other_and_makes_no_series(
    registry: Registry, node: FakeDelivery
) -> None:
    before = numbers(registry)
    for name in ("rejected", "a", "b"):
        node.refusals[name] += 1
        node.traffic.attempts[name] += 1
    after = numbers(registry)
    assert after["update.document.refusals"]["desired", "rejected"] == 1
    assert after["update.document.refusals"]["desired", "other"] == 2
    assert after["delivery.attempt.errors"]["other",] == 3
    assert {name: set(series) for name, series in before.items()} == {
        name: set(series) for name, series in after.items()
    }


def test_every_way_and_code_is_shown_before_it_happened(registry: Registry, node: FakeDelivery) -> None:
    found = numbers(registry)
    assert set(found["delivery.received"]) == {(way,) for way in (*delivery.WAYS, "other")}
    assert found["delivery.file.errors"]["store_failed",] == 0
    assert found["mirror.request.rejected"]["slots",] == 0


def test_metadata_shows_how_long_it_lasts_and_nothing_before_it_came(registry: Registry, node: FakeDelivery) -> None:
    found = numbers(registry)
    assert (found["update.metadata.remaining"][()], found["update.metadata.age"][()]) == (80.0, 10.0)
    node.status.now = 150.0
    assert numbers(registry)["update.metadata.remaining"][()] == -50.0
    node.status.fresh_until = node.status.last_refresh = 0.0
    assert not {"update.metadata.remaining", "update.metadata.age"} & {
        name for name, series in numbers(registry).items() if series
    }


async def test_the_store_is_looked_at_when_somebody_asks_and_a_quota_is_shown_if_there_is_one(
    registry: Registry, node: FakeDelivery
) -> None:
    assert numbers(registry)["store.size"] == {}
    node.usage.total, node.sweeper.quota.max_bytes = 7, None
    await registry.refresh()
    found = numbers(registry)
    assert found["store.size"] == {(): 7}
    assert found["store.size.limit"] == {}
    assert found["store.cache.limit"] == {(): 0}
