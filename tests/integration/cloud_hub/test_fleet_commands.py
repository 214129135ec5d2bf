"""The commands for settings and deployments as processes: a hub, a broker, and a node on which they take effect."""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
from pathlib import Path

import pytest

from deploy.processes import tierline
from sync.member import join
from sync.messages import Capabilities
from sync.settings import Settings
from sync.states import MIN_DEADLINES
from sync.testing import FakeActivator
from tests.integration.cloud_hub.test_hub_process import (
    MOSQUITTO,
    NODE,
    Planned,
    RunningHub,
    package_folder,
    registered,
    running_broker,
    running_hub,
    write,
)

pytestmark = [
    pytest.mark.broker,
    pytest.mark.skipif(MOSQUITTO is None, reason="mosquitto is not installed (package mosquitto)"),
]
OWN = 70_000.0
"""Bytes per second that the node's own configuration gives."""


async def run(hub: RunningHub, *arguments: str, expect: int = 0) -> str:
    """What `tierline ARGUMENTS` says."""
    given = {"TIERLINE_HUB": hub.url, "TIERLINE_TOKEN_FILE": str(hub.data / "admin.token")}
    done = await asyncio.to_thread(
        subprocess.run,
        tierline(*arguments),
        capture_output=True,
        text=True,
        timeout=30,
        env={**os.environ, **given},
        check=False,
    )
    assert done.returncode == expect, done.stdout + done.stderr
    return str(done.stdout + done.stderr)


async def test_settings_and_deployments_are_set_shown_and_removed_and_the_node_follows(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with running_broker(tmp_path / "broker") as broker, running_hub(tmp_path, broker) as hub:
        membership = registered(tmp_path, hub, broker, capsys)
        now, models = [Settings()], Planned()

        async def heard(bandwidth: float | None) -> None:
            async with asyncio.timeout(15):
                while now[-1].bandwidth != bandwidth:
                    await asyncio.sleep(0.02)

        async with join(
            membership,
            activators={"desired": models, "policy": FakeActivator()},
            capabilities=Capabilities(tier="edge"),
            running=dict,
            settings=Settings(bandwidth=OWN),
            on_settings=now.append,
        ):
            await heard(OWN)
            await the_settings_follow(hub, tmp_path, heard)
            await the_deployments_follow(hub, tmp_path, models)


async def the_settings_follow(hub: RunningHub, folder: Path, heard) -> None:
    tenants = write(folder / "acme.json", json.dumps({"bandwidth": 50_000}))
    nodes = write(folder / "node.json", json.dumps({"bandwidth": 20_000, "deadlines": dict(MIN_DEADLINES)}))
    assert "settings of acme are revision 1" in await run(hub, "hub", "settings", "set", "acme", str(tenants))
    await heard(50_000)
    assert "its tenant's apply" in await run(hub, "hub", "settings", "show", NODE)
    assert "revision 2" in await run(hub, "hub", "settings", "set", NODE, str(nodes))
    await heard(20_000)
    assert json.loads(await run(hub, "hub", "settings", "show", NODE)) == json.loads(nodes.read_text())

    short = write(folder / "short.json", '{"deadlines": {"fetching": 5}}')
    assert "deadlines.fetching: 5 s is too short" in await run(
        hub, "hub", "settings", "set", NODE, str(short), expect=1
    )
    removed = await run(hub, "hub", "settings", "remove", NODE)
    assert removed == f"{NODE} goes by the settings of its tenant (revision 3)\n"
    await heard(50_000)
    await run(hub, "hub", "settings", "remove", "acme")
    await heard(OWN)
    assert "the nodes' own apply" in await run(hub, "hub", "settings", "show", "acme", expect=1)
    assert "no settings were set for" in await run(hub, "hub", "settings", "remove", NODE, expect=1)


async def the_deployments_follow(hub: RunningHub, folder: Path, models: Planned) -> None:
    assert await run(hub, "hub", "deployments") == ""
    await run(hub, "publish", str(package_folder(folder / "v1", "1")))
    await run(hub, "deploy", "edges", "--select", "tier=edge", "--model", "digits=digits-cnn/1")
    await until(lambda: len(models.history) == 1)
    listed = (await run(hub, "hub", "deployments")).splitlines()[1].split()
    assert listed[:5] == ["edges", "*", "tier=edge", "digits=digits-cnn/1", "1"]
    assert "edges is gone" in await run(hub, "hub", "deployments", "remove", "edges")
    await until(lambda: models.active == b'{"models":{}}')
    assert await run(hub, "hub", "deployments", "list") == ""
    assert "no deployment 'edges'" in await run(hub, "hub", "deployments", "remove", "edges", expect=1)


async def until(happened) -> None:
    async with asyncio.timeout(15):
        while not happened():
            await asyncio.sleep(0.02)
