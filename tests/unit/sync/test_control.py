"""A node hears when its hub comes back, whether it was restarted or only out of reach."""

from __future__ import annotations

from sync.control import ControlPlane
from sync.messages import Capabilities, HubState, encode
from sync.testing import FakeClock, MemoryBroker, MemoryLink
from sync.topics import HUB_STATE, up

NODE = "acme.edge-1"


async def test_a_hub_that_comes_back_is_told_what_it_missed_whether_or_not_it_was_restarted() -> None:
    broker, returns = MemoryBroker(), list[str]()
    async with MemoryLink(broker) as link:
        control = ControlPlane(
            link,
            NODE,
            {},
            capabilities=Capabilities(tier="edge"),
            running=dict,
            clock=FakeClock(),
            boot="b1",
            on_hub=lambda: returns.append(said),
        )
        link.subscribe(HUB_STATE)
        messages = link.messages()
        for said in ("ready e1", "ready e1", "lost e1", "ready e1", "disconnected e1", "ready e2", "ready e2"):
            state, epoch = said.split()
            broker.publish(HUB_STATE, encode(HubState(state=state, epoch=epoch)), retain=True)
            control._take(await anext(messages))
    assert returns == ["ready e1", "ready e1", "ready e2"]
    assert len(broker.payloads(up(NODE, "state"))) == 2  # once for each start of the hub
