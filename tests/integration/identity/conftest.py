"""A hub with TLS, mosquitto with certificates in front of it, and nodes that join: everything on free ports of loopback."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from cloud_hub.client import HubClient
from cloud_hub.server import HubOptions, running_hub
from deploy.broker import Broker, Secure, find_mosquitto
from deploy.follow import Follower
from deploy.processes import free_port
from sync.credentials import Identity
from sync.enrol import Joined, join_hub
from sync.identity import Membership


class Site:
    """`client` speaks to the hub as the admin; `broker` is a real mosquitto that does what the hub says."""

    def __init__(self, folder: Path, url: str, data: Path, broker: Broker, follower: Follower) -> None:
        self.folder = folder
        self.url = url
        self.data = data
        self.broker = broker
        self.follower = follower
        self.client = HubClient(url, (data / "admin.token").read_text().strip(), data / "tls" / "ca.pem")
        assert broker.secure is not None
        self.mqtts = f"mqtts://127.0.0.1:{broker.secure.port}"

    def invite(self, node: str = "acme.edge-1", **more: Any) -> str:
        body = {"id": node, "tier": "edge", **more}
        return str(self.client.send("POST", "/api/v1/invitations", body)["token"])

    def join(self, node: str = "acme.edge-1", **more: Any) -> Joined:
        return join_hub(self.url, self.invite(node, **more), self.folder / node, tier=more.get("tier", "edge"))

    def identity(self, node: str) -> Identity:
        return Identity(self.folder / node / "identity")

    def membership(self, joined: Joined) -> Membership:
        from sync.enrol_cli import _Whole
        from sync.identity import load_config

        return load_config(joined.config, _Whole).node

    async def in_thread(self, work: Callable[..., Any], *arguments: Any, **more: Any) -> Any:
        return await asyncio.to_thread(lambda: work(*arguments, **more))


@asynccontextmanager
async def running_site(folder: Path, websocket: bool = False) -> AsyncIterator[Site]:
    secure = Secure(("127.0.0.1",), free_port(), "127.0.0.1", free_port() if websocket else None)
    broker = Broker(folder / "broker", secure=secure)
    data = folder / "hub"
    broker_url = f"mqtts://127.0.0.1:{secure.port}"
    options = HubOptions(
        data=data, port=0, broker=broker_url, names=("127.0.0.1",), public_brokers=(broker_url,), public_urls=()
    )
    ended = threading.Event()
    async with running_hub(options) as url:
        follower = Follower(broker, url, data / "admin.token", data / "tls" / "ca.pem")
        await asyncio.to_thread(follower.wait_for_certificate)
        await asyncio.to_thread(broker.start)

        def follow() -> None:
            while not ended.wait(0.1):
                follower.turn()

        thread = threading.Thread(target=follow)
        thread.start()
        try:
            site = Site(folder, url, data, broker, follower)
            yield site
            site.client.close()
        finally:
            ended.set()
            await asyncio.to_thread(thread.join)
            await asyncio.to_thread(broker.stop)


@pytest.fixture
async def site(tmp_path: Path) -> AsyncIterator[Site]:
    if find_mosquitto() is None:
        pytest.skip("mosquitto is not installed: identities were NOT tested against a real broker")
    async with running_site(tmp_path) as site:
        yield site


async def eventually(check: Callable[[], bool], seconds: float = 10.0, *, thread: bool = False) -> float:
    """Seconds until `check` was true. `thread`: it blocks, on a hub that runs in this very loop."""
    began = time.monotonic()
    while not (await asyncio.to_thread(check) if thread else check()):
        if time.monotonic() - began > seconds:
            pytest.fail(f"not within {seconds:g} s")
        await asyncio.sleep(0.01)
    return time.monotonic() - began
