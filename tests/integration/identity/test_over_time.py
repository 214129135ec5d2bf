"""What time does to identities: expiry while away, and a change of authority, on a real hub and a real broker."""

from __future__ import annotations

import asyncio
import time

import pytest

from cloud_hub.authority import open_authority
from sync.channel import LinkOptions
from sync.clock import SystemClock
from sync.credentials import Identity, write_pair
from sync.link import Link
from sync.renewal import Renewal
from tests.integration.identity.conftest import Site, eventually

pytestmark = pytest.mark.broker
NODE, OTHER = "acme.edge-1", "acme.edge-2"


def options(site: Site, identity: Identity) -> LinkOptions:
    return LinkOptions(
        url=site.mqtts, client_id=identity.pair.node, tls=identity.link_context, min_delay=0.05, max_delay=0.2
    )


async def test_an_expired_certificate_opens_no_connection_and_renews_all_the_same(site: Site) -> None:
    await site.in_thread(site.join)
    folder = site.folder / NODE / "identity"
    identity = Identity(folder)
    long_ago = time.time() - 400 * 86_400
    old = open_authority(site.data / "ca", time.time()).issue_node(identity.pair.key.public_key(), NODE, (), long_ago)
    bundle = (folder / "ca.pem").read_text()
    write_pair(folder, identity.pair.key, old.chain.decode(), bundle)
    identity = Identity(folder)
    identity.forget_older()
    async with Link(options(site, identity)) as link:
        await asyncio.sleep(1.0)
        assert not link.connected
        await site.in_thread(Renewal(identity, site.url, SystemClock()).renew)
        await eventually(lambda: link.connected)


async def test_a_change_of_authority_loses_neither_who_was_there_nor_who_was_away(site: Site) -> None:
    await site.in_thread(site.join, NODE)
    await site.in_thread(site.join, OTHER)
    here, away = site.identity(NODE), site.identity(OTHER)
    async with Link(options(site, here)) as link:
        await eventually(lambda: link.connected)
        await site.in_thread(site.client.send, "POST", "/api/v1/authority/next", {})
        await site.in_thread(Renewal(here, site.url, SystemClock()).renew)
        assert here.ca.read_text().count("BEGIN CERTIFICATE") == 2
        await site.in_thread(site.client.send, "POST", "/api/v1/authority/switch", {"force": True})
        await asyncio.sleep(1.5)  # the broker gets its certificate from the new authority; the hub's server has it
        await site.in_thread(Renewal(here, site.url, SystemClock()).renew)
    # Trusts the old authority alone, shows a certificate of it, and meets servers of the new one.
    assert away.ca.read_text().count("BEGIN CERTIFICATE") == 1
    for identity in (here, away):
        async with Link(options(site, identity)) as link:
            await eventually(lambda link=link: link.connected)  # type: ignore[misc]
    await site.in_thread(Renewal(away, site.url, SystemClock()).renew)
    async with Link(options(site, away)) as link:
        await eventually(lambda: link.connected)
