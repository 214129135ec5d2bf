"""An identity from its token to its end, on a real hub and a real broker."""

from __future__ import annotations

import asyncio
import time

import pytest

from sync.channel import LinkOptions
from sync.clock import SystemClock
from sync.download import Download, Limits
from sync.enrol import join_hub, leave_hub
from sync.errors import BadSignature, Unavailable
from sync.hub_call import HubRefused
from sync.link import Link
from sync.member import join
from sync.messages import Capabilities
from sync.renewal import Renewal
from sync.testing import FakeActivator
from tests.integration.identity.conftest import Site, eventually

pytestmark = pytest.mark.broker


async def test_a_node_joins_with_a_token_alone_works_and_is_thrown_out_within_a_minute(site: Site) -> None:
    joined = await site.in_thread(site.join)
    membership = site.membership(joined)
    async with join(
        membership,
        activators={"policy": FakeActivator()},
        capabilities=Capabilities(tier="edge"),
        running=dict,
    ) as member:
        await eventually(lambda: member.connected)
        await eventually(lambda: site.client.get("/api/v1/nodes/acme.edge-1")["state"] == "ready", thread=True)
        source = member.fetcher.sources[0]
        url, limits = source.url, Limits()
        fetch = Download(f"{url}/tuf/1.root.json", source.token, limits, route=source.route)
        assert await site.in_thread(fetch.read, 100_000)

        began = time.monotonic()
        await site.in_thread(site.client.send, "POST", "/api/v1/nodes/acme.edge-1/revoke", {"reason": "stolen"})
        await eventually(lambda: not member.connected, 60)
        print(f"revoked to disconnected: {time.monotonic() - began:.2f} s")
        again = Download(f"{url}/tuf/1.root.json", source.token, limits, route=source.route)
        with pytest.raises(Unavailable, match="401"):
            await site.in_thread(again.read, 100_000)
        with pytest.raises(HubRefused, match="revoked"):
            await site.in_thread(Renewal(site.identity("acme.edge-1"), site.url, SystemClock()).renew)
        await asyncio.sleep(1.0)
        assert not member.connected
    assert {entry["id"] for entry in await site.in_thread(site.client.get, "/api/v1/denied")} == {"acme.edge-1"}


async def test_a_token_opens_only_the_hub_it_is_of(site: Site) -> None:
    token = await site.in_thread(site.invite)
    forged = token[:-64] + "0" * 64
    with pytest.raises(BadSignature, match="another fingerprint"):
        await site.in_thread(join_hub, site.url, forged, site.folder / "n", tier="edge")
    assert not (site.folder / "n").exists()


async def test_renewing_changes_key_and_certificate_and_leaves_the_connection_alone(site: Site) -> None:
    await site.in_thread(site.join)
    identity = site.identity("acme.edge-1")
    options = LinkOptions(url=site.mqtts, client_id="acme.edge-1", tls=identity.link_context)
    async with Link(options) as link:
        link.on_connect(identity.connected)
        await eventually(lambda: link.connected)
        before = identity.pair
        renewal = Renewal(identity, site.url, SystemClock())
        await site.in_thread(renewal.renew)
        assert link.connected
        assert identity.pair.folder != before.folder
        assert before.folder.exists(), "the old pair is kept until the new one has connected"
        assert identity.pair.key.public_key() != before.key.public_key()
    async with Link(options) as link:
        link.on_connect(identity.connected)
        await eventually(lambda: link.connected)
        assert not before.folder.exists()


async def test_leaving_forgets_on_both_sides(site: Site) -> None:
    joined = await site.in_thread(site.join)
    assert "the hub has forgotten" in await site.in_thread(leave_hub, site.membership(joined))
    assert not (site.folder / "acme.edge-1" / "identity").exists()
    assert (await site.in_thread(site.client.get, "/api/v1/nodes"))["items"] == []
