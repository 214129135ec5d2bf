"""The misbehaving hub against what nodes are made of: an outbox, a control plane, a fetcher."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import pytest

from sync import topics
from sync.channel import Message
from sync.chaos.hub import HubSimulator, simulated_hub
from sync.errors import BadSignature, Replayed
from sync.testing import MemoryBroker, MemoryLink
from sync.trust import verify

NODE = "acme.edge-1"


@pytest.fixture
def broker() -> MemoryBroker:
    return MemoryBroker()


@pytest.fixture
async def hub(broker: MemoryBroker) -> AsyncIterator[HubSimulator]:
    async with MemoryLink(broker) as link, simulated_hub(link, seed=3) as found:
        yield found


def revision(payload: bytes, hub: HubSimulator, floor: int = 0) -> int:
    verified = verify(payload, hub.keyring, kind="desired", scope=f"node:{NODE}", floor=floor, now=1e10)
    return verified.document.revision


async def test_documents_are_good_ones_and_count_up(hub: HubSimulator, broker: MemoryBroker) -> None:
    hub.desire(NODE, {"models": {}})
    hub.desire(NODE, {"models": {}})
    sent = broker.payloads(topics.down(NODE, "desired"))
    assert [revision(payload, hub) for payload in sent] == [1, 2]
    with pytest.raises(Replayed):
        revision(sent[0], hub, floor=2)


async def test_a_stranger_signs_what_nobody_believes(hub: HubSimulator) -> None:
    with pytest.raises(BadSignature):
        revision(hub.envelope("desired", f"node:{NODE}", {}, key=hub.stranger), hub)


async def test_a_storm_and_doubles_and_another_order(hub: HubSimulator, broker: MemoryBroker) -> None:
    hub.manners.copies = 3
    hub.desire(NODE, 1)
    topic = topics.down(NODE, "desired")
    assert len(broker.payloads(topic)) == 3
    assert hub.storm(50) == 50
    assert len(set(broker.payloads(topic))) == 1
    hub.manners.copies, hub.manners.hold = 1, True
    for number in range(20):
        hub.desire(NODE, number)
    assert len(broker.payloads(topic)) == 53
    assert hub.let_go() == 20
    order = [revision(payload, hub) for payload in broker.payloads(topic)[53:]]
    assert sorted(order) == list(range(2, 22))
    assert order != sorted(order)


async def test_a_share_of_messages_is_lost_and_counted(hub: HubSimulator, broker: MemoryBroker) -> None:
    hub.manners.lost = 0.5
    for number in range(100):
        hub.desire(NODE, number)
    assert 25 < hub.lost < 75
    assert len(broker.payloads(topics.down(NODE, "desired"))) == 100 - hub.lost


async def test_what_makes_no_sense_is_kept_apart_and_ends_nothing(hub: HubSimulator, broker: MemoryBroker) -> None:
    for leaf in ("state", "caps", "reported", "event"):
        broker.publish(topics.up(NODE, leaf), b"\xff nonsense")
    broker.publish(topics.up(NODE, "state"), b'{"v":1,"state":"ready"}')
    async with asyncio.timeout(5):
        while NODE not in hub.nodes or not hub.nodes[NODE].states:
            await asyncio.sleep(0)
    assert len(hub.nodes[NODE].malformed) == 4


async def test_a_restart_tells_a_new_epoch(hub: HubSimulator, broker: MemoryBroker) -> None:
    hub.restart()
    hub.restart()
    said = [message for message in broker.log if message.topic == topics.HUB_STATE]
    assert len({message.payload for message in said}) == 2
    assert isinstance(said[0], Message)
    assert said[0].retain
