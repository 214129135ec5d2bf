"""The broker's checks against a real one: with the hub's access list, without any, and with a password that is wrong."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from pathlib import Path

import pytest
from doctor_nodes import CANARY, NODE, make_node

from cloud_hub.auth import broker_hash
from deploy.broker import Broker, find_mosquitto
from sync.channel import LinkOptions
from sync.doctor.broker import BROKER
from sync.doctor.check import Finding
from sync.doctor.runner import run_checks
from sync.doctor.subject import NodeSubject
from sync.link import Link
from sync.messages import HubState, State, encode
from sync.topics import HUB_STATE, HUB_USER, access_list, down, up
from tests.integration.sync.conftest import Mosquitto

pytestmark = pytest.mark.broker
OTHER = "acme.edge-2"


@pytest.fixture
def guarded(tmp_path: Path) -> Iterator[Broker]:
    if find_mosquitto() is None:
        pytest.skip("mosquitto is not installed: the doctor was NOT tested against a real broker")
    broker = Broker(tmp_path / "broker")
    broker.start()
    hub = broker_hash(broker.hub_password.read_text())
    passwords = f"{HUB_USER}:{hub}\n{NODE}:{broker_hash(CANARY)}\n"
    broker.admit(passwords, access_list([NODE, OTHER]))
    yield broker
    broker.stop()


async def retain(url: str, password: str | None, *, desired: bool) -> None:
    """What a hub keeps at its broker."""
    async with Link(LinkOptions(url=url, client_id=HUB_USER, username=HUB_USER, password=password)) as link:
        there = asyncio.Event()
        link.on_connect(there.set)
        async with asyncio.timeout(10):
            await there.wait()
        link.publish(HUB_STATE, encode(HubState(state="ready", epoch="e")), retain=True)
        link.publish(up(OTHER, "state"), encode(State(state="ready")), retain=True)
        if desired:
            link.publish(down(NODE, "desired"), b"{}", retain=True)


def ask(subject: NodeSubject) -> dict[str, Finding]:
    return {result.name: result.finding for result in run_checks(BROKER, subject)}


def test_a_node_with_a_well_kept_broker_has_nothing_to_mend(guarded: Broker, tmp_path: Path) -> None:
    asyncio.run(retain(guarded.url, guarded.hub_password.read_text(), desired=True))
    found = ask(make_node(tmp_path / "node", broker=guarded.url))
    assert {name: finding.status for name, finding in found.items()} == dict.fromkeys(found, "ok")
    assert found["broker.version"].found == "MQTT 5"


def test_a_desired_document_that_is_not_there_is_told(guarded: Broker, tmp_path: Path) -> None:
    asyncio.run(retain(guarded.url, guarded.hub_password.read_text(), desired=False))
    finding = ask(make_node(tmp_path / "node", broker=guarded.url))["broker.retained"]
    assert finding.status == "warn"
    assert "tierline deploy" in finding.fix


def test_a_password_that_the_broker_does_not_know_is_told(guarded: Broker, tmp_path: Path) -> None:
    node = make_node(tmp_path / "node", broker=guarded.url)
    (tmp_path / "node" / "token").write_text("another-password")
    found = ask(node)
    assert found["broker.login"].status == "fail"
    assert "the hub does not know this node" in found["broker.login"].fix
    assert found["broker.access"].status == "skip"


def test_an_access_list_that_is_too_narrow_is_told(guarded: Broker, tmp_path: Path) -> None:
    passwords = f"{NODE}:{broker_hash(CANARY)}\n"
    guarded.admit(passwords, f"user {NODE}\ntopic read {HUB_STATE}\n")
    finding = ask(make_node(tmp_path / "node", broker=guarded.url))["broker.publish"]
    assert finding.status == "fail"
    assert "/api/v1/broker/access" in finding.fix


def test_a_broker_without_an_access_list_is_found_out(broker: Mosquitto, tmp_path: Path) -> None:
    asyncio.run(retain(broker.url, None, desired=True))
    finding = ask(make_node(tmp_path / "node", broker=broker.url))["broker.access"]
    assert finding.status == "fail"
    assert "can read what is not its own" in finding.found
    assert "access list is missing" in finding.fix
