"""A node starts from its disk, follows the hub, says what it runs, and nothing that arrives can end it."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import msgspec
import pytest

from sync import topics
from sync.control import lost
from sync.errors import InvalidConfig
from sync.identity import Membership
from sync.member import Member, join
from sync.messages import Capabilities, Document, HubState, Reported, State, decode, encode
from sync.testing import ROOT, FakeActivator, FakeClock, MemoryBroker, MemoryLink, know
from sync.trust import sign
from tests.unit.sync.conftest import RING, SIGNER

NODE = "acme.edge-1"
POLICY = topics.tenant_policy("acme")


class Site:
    """One node's folder, the broker it talks to, and what the hub would see there."""

    def __init__(self, folder: Path) -> None:
        self.clock, self.broker = FakeClock(), MemoryBroker()
        self.activators = {"desired": FakeActivator(), "policy": FakeActivator()}
        (folder / "root.json").write_bytes(ROOT)
        know(folder / "data", RING, self.clock.wall() + 1e6)
        (folder / "token").write_bytes(b"secret")
        (folder / "token").chmod(0o600)
        self.membership = Membership(
            id=NODE,
            tier="edge",
            broker="mqtt://127.0.0.1:1",
            root=folder / "root.json",
            credential=folder / "token",
            data=folder / "data",
        )

    @asynccontextmanager
    async def joined(self, link: MemoryLink | None = None) -> AsyncIterator[tuple[Member, MemoryLink]]:
        async with (
            link or MemoryLink(self.broker, lost(NODE, "boot")) as connected,
            join(
                self.membership,
                activators=self.activators,
                capabilities=Capabilities(tier="edge", engines=("onnx",)),
                running=lambda: {"digits": "digits-cnn/1"},
                clock=self.clock,
                link=connected,
            ) as member,
        ):
            yield member, connected

    def policy(self, body: bytes, revision: int) -> bytes:
        document = Document("policy", "tenant:acme", revision, self.clock.wall(), (), msgspec.Raw(body))
        return sign(document, [SIGNER])

    def reported(self) -> Reported:
        return decode(self.broker.retained[topics.up(NODE, "reported")], Reported)

    def state(self) -> str:
        return decode(self.broker.retained[topics.up(NODE, "state")], State).state

    async def born(self) -> None:
        """Until the node has subscribed and made its first report."""
        await self.when(lambda: topics.up(NODE, "reported") in self.broker.retained)

    async def when(self, ready: Callable[[], bool]) -> None:
        async with asyncio.timeout(3):
            while not ready():
                await asyncio.sleep(0)
                if self.clock.sleepers:
                    self.clock.advance(0.05)


@pytest.fixture
def site(tmp_path: Path) -> Site:
    return Site(tmp_path)


async def test_a_policy_travels_from_the_broker_to_the_activator_and_back_as_a_report(site: Site) -> None:
    async with site.joined() as (member, _):
        site.broker.publish(POLICY, site.policy(b'"p1"', 1), retain=True)
        await site.when(lambda: site.activators["policy"].active == b'"p1"')
        await site.when(lambda: site.reported().documents["policy"].state == "applied")
        report = site.reported()
        assert report.documents["policy"].applied == 1
        assert report.running == {"digits": "digits-cnn/1"}
        assert member.connected


async def test_birth_capabilities_and_goodbye_are_said(site: Site) -> None:
    async with site.joined():
        await site.when(lambda: topics.up(NODE, "caps") in site.broker.retained)
        assert site.state() == "ready"
        assert decode(site.broker.retained[topics.up(NODE, "caps")], Capabilities).engines == ("onnx",)
    assert site.state() == "disconnected"


async def test_what_changed_just_before_leaving_is_still_reported(site: Site) -> None:
    async with site.joined():
        await site.born()
        # The clock stands still from here: the pause between two reports never ends by itself.
        site.broker.publish(POLICY, site.policy(b'"p1"', 1), retain=True)
        async with asyncio.timeout(3):
            while site.activators["policy"].active != b'"p1"':
                await asyncio.sleep(0)
    assert site.reported().documents["policy"].applied == 1


async def test_the_will_says_lost_and_the_next_connect_says_everything_again(site: Site) -> None:
    async with site.joined() as (_, link):
        await site.born()
        link.drop()
        assert site.state() == "lost"
        site.broker.forget()
        link.heal()
        await site.born()
        assert site.state() == "ready"
        assert topics.up(NODE, "caps") in site.broker.retained


async def test_a_hub_that_started_again_is_told_everything_again_but_not_twice(site: Site) -> None:
    async with site.joined():
        await site.when(lambda: len(site.broker.payloads(topics.up(NODE, "caps"))) == 1)
        for _ in range(2):
            site.broker.publish(topics.HUB_STATE, encode(HubState(state="ready", epoch="2")), retain=True)
        await site.when(lambda: len(site.broker.payloads(topics.up(NODE, "caps"))) == 2)
        for _ in range(100):
            await asyncio.sleep(0)
            site.clock.advance(0.05)
        assert len(site.broker.payloads(topics.up(NODE, "caps"))) == 2


async def test_reports_are_numbered_within_one_boot(site: Site) -> None:
    async with site.joined():
        await site.born()
        for revision in range(1, 4):
            site.broker.publish(POLICY, site.policy(b'"p%d"' % revision, revision), retain=True)
            await site.when(lambda wanted=revision: site.reported().documents["policy"].applied == wanted)
    reports = [decode(item, Reported) for item in site.broker.payloads(topics.up(NODE, "reported"))]
    assert [report.seq for report in reports] == list(range(1, len(reports) + 1))
    assert len({report.boot for report in reports}) == 1


GARBAGE = [
    (POLICY, b""),
    (POLICY, b"\xff" * 100),
    (POLICY, b"[" * 60_000),
    (topics.down(NODE, "desired"), b"{}"),
    (topics.down(NODE, "job"), b"nobody reads jobs yet"),
    (topics.HUB_STATE, b"garbage"),
    (topics.HUB_STATE, b'{"state":"ready","epoch":"\x80"}'),
]


@pytest.mark.parametrize("number", range(len(GARBAGE)))
async def test_garbage_is_counted_and_a_good_policy_still_arrives(site: Site, number: int) -> None:
    topic, payload = GARBAGE[number]
    async with site.joined():
        await site.born()
        site.broker.publish(topic, payload)
        site.broker.publish(POLICY, site.policy(b'"p1"', 1), retain=True)
        await site.when(lambda: site.activators["policy"].active == b'"p1"')
        await site.when(lambda: sum(site.reported().refused.values()) == 1)


async def test_a_node_restarts_without_broker_or_hub_and_serves_what_it_had(site: Site) -> None:
    async with site.joined():
        site.broker.publish(POLICY, site.policy(b'"p1"', 1), retain=True)
        await site.when(lambda: site.activators["policy"].active == b'"p1"')
    site.broker = MemoryBroker()
    site.activators["policy"] = FakeActivator()
    async with site.joined() as (member, _):
        assert site.activators["policy"].active == b'"p1"'
        assert member.updaters["policy"].report.state == "applied"


async def test_files_that_no_stored_document_names_are_swept_at_the_start(site: Site) -> None:
    async with site.joined() as (member, _):
        stray = member.store.path("sha256:" + "a" * 64)
        stray.write_bytes(b"")
    async with site.joined():
        assert not stray.exists()


async def test_a_folder_belongs_to_one_process_at_a_time(site: Site) -> None:
    async with site.joined():
        with pytest.raises(InvalidConfig, match="in use"):
            async with site.joined():
                pass
    async with site.joined():
        pass


async def test_a_mistake_in_what_is_running_does_not_end_the_reports(
    site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with site.joined() as (member, _):
        await site.born()
        with monkeypatch.context() as patch:
            patch.setattr(member.control, "_running", lambda: 1 / 0)
            site.broker.publish(POLICY, site.policy(b'"p1"', 1), retain=True)
            await site.when(lambda: site.activators["policy"].active == b'"p1"')
        site.broker.publish(POLICY, site.policy(b'"p2"', 2), retain=True)
        await site.when(lambda: site.reported().documents["policy"].applied == 2)


async def test_a_kind_that_is_never_sent_is_a_configuration_error(site: Site) -> None:
    site.activators["weather"] = FakeActivator()
    with pytest.raises(InvalidConfig, match="weather"):
        async with site.joined():
            pass
