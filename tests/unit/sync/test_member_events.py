"""A member's events: what its updaters do goes up, what the hub acknowledges leaves the disk, nonsense is counted."""

from __future__ import annotations

from pathlib import Path

import msgspec
import pytest

from sync import topics
from sync.events import Ack, Event, unpack, unpack_event
from sync.messages import encode
from sync.update_events import UpdateEvent
from tests.unit.sync.test_member import NODE, POLICY, Site

ACK = topics.down(NODE, "ack")


@pytest.fixture
def site(tmp_path: Path) -> Site:
    return Site(tmp_path)


def sent(site: Site) -> list[Event]:
    packets = site.broker.payloads(topics.up(NODE, "event"))
    return [unpack_event(raw) for packet in packets for raw in unpack(packet).events]


async def test_an_applied_document_is_an_event_that_stays_until_the_hub_has_it(site: Site) -> None:
    async with site.joined() as (member, _):
        site.broker.publish(POLICY, site.policy(b'"p1"', 1), retain=True)
        await site.when(lambda: len(sent(site)) > 0)
        event = sent(site)[0]
        body = msgspec.json.decode(event.body, type=UpdateEvent)
        assert (event.kind, event.priority) == ("update", 8)
        assert (body.document, body.state, body.applied) == ("policy", "applied", 1)
        assert member.outbox.pending == 1
        site.broker.publish(ACK, encode(Ack(ids=(event.id,), fleet=500)))
        await site.when(lambda: member.outbox.pending == 0)
        assert member.outbox.flight.fleet == 500
        assert member.outbox.totals()["delivered"] == 1


async def test_events_put_in_while_the_broker_is_away_go_up_when_it_is_back_also_after_a_restart(site: Site) -> None:
    async with site.joined() as (member, link):
        link.drop()
        await member.outbox.put("app.door", b"1")
    async with site.joined():
        await site.when(lambda: [event.body for event in sent(site)] == [b"1"])


async def test_a_senseless_acknowledgement_is_counted_and_ends_nothing(site: Site) -> None:
    async with site.joined() as (member, _):
        await site.born()
        site.broker.publish(ACK, b"\xff\x00")
        await site.when(lambda: member.control.refused["malformed"] == 1)
        await member.outbox.put("app.door", b"1")
        await site.when(lambda: len(sent(site)) == 1)
