"""A whole node on a real broker: a signed policy goes in, a report comes out, and it leaves in good order."""

from __future__ import annotations

import asyncio
import time
from pathlib import Path

import msgspec
import pytest

from sync import topics
from sync.channel import LinkOptions
from sync.identity import Membership
from sync.link import Link
from sync.member import join
from sync.messages import Capabilities, Document, Reported, State, decode
from sync.testing import ROOT, FakeActivator, know
from sync.trust import Keyring, SigningKey, sign
from tests.integration.sync.conftest import Mosquitto

pytestmark = pytest.mark.broker
NODE = "acme.edge-1"


async def test_a_node_follows_the_hub_through_a_real_broker(broker: Mosquitto, tmp_path: Path) -> None:
    key = SigningKey.generate()
    (tmp_path / "root.json").write_bytes(ROOT)
    know(tmp_path / "data", Keyring((key.key("policy"),)), time.time() + 1_000)
    (tmp_path / "token").write_text("secret")
    (tmp_path / "token").chmod(0o600)
    membership = Membership(
        id=NODE,
        tier="edge",
        broker=broker.url,
        root=tmp_path / "root.json",
        credential=tmp_path / "token",
        data=tmp_path / "data",
    )
    book = FakeActivator()
    said: dict[str, bytes] = {}

    async def listen(hub: Link) -> None:
        async for message in hub.messages():
            said[message.topic.rsplit("/", 1)[1]] = message.payload

    async def when(ready: object) -> None:
        async with asyncio.timeout(10):
            while not ready():  # type: ignore[operator]
                await asyncio.sleep(0.005)

    async with Link(LinkOptions(url=broker.url, client_id=topics.HUB_USER)) as hub:
        hub.subscribe(*topics.hub_filters())
        listener = asyncio.create_task(listen(hub))
        async with join(
            membership,
            activators={"policy": book},
            capabilities=Capabilities(tier="edge"),
            running=dict,
        ) as member:
            await when(lambda: "reported" in said)
            document = Document("policy", "tenant:acme", 1, time.time(), (), msgspec.Raw(b'"p1"'))
            hub.publish(topics.tenant_policy("acme"), sign(document, [key]), retain=True)
            await when(lambda: book.active == b'"p1"')
            await when(lambda: decode(said["reported"], Reported).documents["policy"].state == "applied")
            assert member.connected
            assert decode(said["state"], State).state == "ready"
        await when(lambda: decode(said["state"], State).state == "disconnected")
        listener.cancel()
