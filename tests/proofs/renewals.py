"""Renew a node's certificate many times on a real hub and broker: the connection stays up, and each new pair opens one.

    python tests/proofs/renewals.py --count 200

Prints one line of JSON: renewals, how often the standing connection was lost, connections by a new pair that failed.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))

from cloud_hub import enrolment
from sync.channel import LinkOptions
from sync.clock import SystemClock
from sync.link import Link
from sync.renewal import Renewal
from tests.integration.identity.conftest import Site, eventually, running_site

NODE = "acme.edge-1"
WATCHER = "acme.edge-2"


async def prove(count: int) -> dict[str, object]:
    lost = failed = 0
    enrolment.MAX_CERTIFICATES = 10 * count  # in place of time that passes
    with tempfile.TemporaryDirectory() as folder:
        async with running_site(Path(folder)) as site:
            for node in (NODE, WATCHER):
                await site.in_thread(site.join, node)
            standing = site.identity(WATCHER)
            began = time.monotonic()
            async with Link(_options(site, standing)) as link:
                await eventually(lambda: link.connected)
                for _ in range(count):
                    for identity in (standing, site.identity(NODE)):
                        await site.in_thread(Renewal(identity, site.url, SystemClock()).renew)
                    lost += not link.connected
                    failed += not await _opens(site)
            seconds = time.monotonic() - began
    return {"renewals": 2 * count, "standing_connection_lost": lost, "failed_connections": failed, "seconds": seconds}


async def _opens(site: Site) -> bool:
    identity = site.identity(NODE)
    async with Link(_options(site, identity)) as link:
        link.on_connect(identity.connected)
        try:
            async with asyncio.timeout(10):
                while not link.connected:
                    await asyncio.sleep(0.001)
        except TimeoutError:
            return False
    return True


def _options(site: Site, identity: object) -> LinkOptions:
    from sync.credentials import Identity

    assert isinstance(identity, Identity)
    return LinkOptions(url=site.mqtts, client_id=identity.pair.node, tls=identity.link_context)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--count", type=int, default=100)
    print(json.dumps(asyncio.run(prove(parser.parse_args().count))))
