"""A hub as a process with a real broker in front of it: the commands, the push, the broker that forgets."""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager, contextmanager
from getpass import getuser
from pathlib import Path
from typing import Any

import pytest
import urllib3
from hub_in_memory import digest, make_manifest

from cloud_hub.auth import broker_hash
from cloud_hub.cli import COMMANDS
from models.desired import decode_desired, plan
from models.manifest import encode_manifest
from sync.activation import Probation
from sync.channel import LinkOptions, Message
from sync.identity import Membership
from sync.link import Link
from sync.member import join
from sync.messages import Capabilities
from sync.testing import FakeActivator
from sync.topics import access_list, node_filters
from sync.trust import decode_keyring, verify

MOSQUITTO = shutil.which("mosquitto", path=os.environ.get("PATH", "") + ":/usr/sbin")
HUB_PASSWORD = "for this test alone"
NODE = "acme.edge-1"

pytestmark = [
    pytest.mark.broker,
    pytest.mark.skipif(MOSQUITTO is None, reason="mosquitto is not installed (package mosquitto)"),
]


class Broker:
    """mosquitto on a port of its own, without persistence: killing it makes it forget."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = probe.getsockname()[1]
        self.url = f"mqtt://127.0.0.1:{self.port}"
        self.admit(f"_hub-1:{broker_hash(HUB_PASSWORD)}\n", access_list([]))
        (folder / "mosquitto.conf").write_text(
            f"listener {self.port} 127.0.0.1\nuser {getuser()}\nallow_anonymous false\n"
            f"password_file {folder / 'passwords'}\nacl_file {folder / 'acl'}\nset_tcp_nodelay true\n"
        )
        self.process: subprocess.Popen[bytes] | None = None

    def admit(self, passwords: str, acl: str) -> None:
        for name, content in (("passwords", passwords), ("acl", acl)):
            (self.folder / name).write_text(content)
            (self.folder / name).chmod(0o600)

    def start(self) -> None:
        command = [str(MOSQUITTO), "-c", str(self.folder / "mosquitto.conf")]
        self.process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        wait_for(self._answers)

    def reload(self) -> None:
        assert self.process is not None
        self.process.send_signal(signal.SIGHUP)

    def kill(self) -> None:
        if self.process is not None:
            self.process.kill()
            self.process.wait(10)

    def _answers(self) -> bool:
        with socket.socket() as probe:
            return probe.connect_ex(("127.0.0.1", self.port)) == 0


class RunningHub:
    """`tierline hub` in a child process, and the commands that speak to it."""

    def __init__(self, folder: Path, broker: Broker) -> None:
        self.data = folder / "hub"
        password = folder / "hub.password"
        password.write_text(HUB_PASSWORD)
        options = ["--data", str(self.data), "--http-port", "0", "--broker", broker.url]
        options += ["--broker-password-file", str(password)]
        code = "import sys; from cloud_hub.cli import hub; sys.exit(hub(sys.argv[1:]))"
        with (folder / "hub.log").open("ab") as log:
            self.process = subprocess.Popen([sys.executable, "-c", code, *options], stdout=log, stderr=log)
        wait_for((self.data / "hub.json").exists)
        self.url = json.loads((self.data / "hub.json").read_text())["url"]
        self.headers = {"authorization": f"Bearer {(self.data / 'admin.token').read_text().strip()}"}

    def request(self, method: str, path: str, **request: object) -> urllib3.BaseHTTPResponse:
        return POOL.request(method, self.url + path, headers=self.headers, **request)  # type: ignore[arg-type]

    def run(self, command: str, *arguments: str) -> int:
        options = ["--hub", self.url, "--token-file", str(self.data / "admin.token")]
        return COMMANDS[command][1]([*arguments, *options])

    def stop(self) -> int:
        self.process.terminate()
        code = self.process.wait(15)
        assert not (self.data / "hub.json").exists()
        return code


POOL = urllib3.PoolManager(timeout=10, retries=False)


def wait_for(happened: object, seconds: float = 15.0) -> None:
    until = time.monotonic() + seconds
    while not happened():  # type: ignore[operator]
        assert time.monotonic() < until, "it did not happen in time"
        time.sleep(0.01)


@contextmanager
def running_broker(folder: Path) -> Iterator[Broker]:
    folder.mkdir()
    broker = Broker(folder)
    broker.start()
    try:
        yield broker
    finally:
        broker.kill()


@contextmanager
def running_hub(folder: Path, broker: Broker) -> Iterator[RunningHub]:
    hub = RunningHub(folder, broker)
    try:
        yield hub
    finally:
        if hub.process.poll() is None:
            assert hub.stop() == 0, (folder / "hub.log").read_text()


@asynccontextmanager
async def node_link(broker: Broker, node_id: str, token: str) -> AsyncIterator[Link]:
    options = LinkOptions(
        url=broker.url, client_id=node_id, username=node_id, password=token, min_delay=0.05, max_delay=0.2
    )
    async with Link(options) as link:
        link.subscribe(*node_filters(node_id))
        yield link


async def next_on(link: Link, topic: str, seconds: float = 10.0) -> Message:
    async with asyncio.timeout(seconds):
        async for message in link.messages():
            if message.topic == topic:
                return message
    pytest.fail("the link was closed")


def package_folder(folder: Path, version: str) -> Path:
    folder.mkdir()
    golden, model = b"golden", b"model " + version.encode()
    (folder / "golden.npz").write_bytes(golden)
    (folder / "anything.onnx").write_bytes(model)
    (folder / "manifest.json").write_bytes(encode_manifest(make_manifest("digits-cnn", version, golden, model)))
    return folder


def register(hub: RunningHub, broker: Broker, capsys: pytest.CaptureFixture[str]) -> str:
    """Register the node through the command line and tell the broker."""
    assert hub.run("node-add", NODE, "--tier", "edge", "--label", "line=2") == 0
    token = capsys.readouterr().out.strip()
    access = hub.request("GET", "/api/v1/broker/access").json()
    broker.admit(access["passwords"], access["acl"])
    broker.reload()
    return token


async def test_from_publishing_to_the_node_over_a_real_broker(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with running_broker(tmp_path / "broker") as broker, running_hub(tmp_path, broker) as hub:
        token = register(hub, broker, capsys)
        assert hub.run("publish", str(package_folder(tmp_path / "v1", "1"))) == 0
        assert hub.run("publish", str(tmp_path / "v1")) == 0
        assert "(0 files uploaded)" in capsys.readouterr().out
        assert hub.run("deploy", "edges", "--select", "tier=edge", "--model", "digits=digits-cnn/1") == 0
        assert NODE in capsys.readouterr().out
        keyring = decode_keyring((hub.data / "keys" / "documents.json").read_bytes())
        async with node_link(broker, NODE, token) as link:
            desired = await next_on(link, f"tierline/v1/{NODE}/down/desired")
            verify(desired.payload, keyring, kind="desired", scope=f"node:{NODE}", floor=0, now=time.time())
            took = [await push_policy(hub, link, number) for number in range(10)]
            assert sorted(took)[5] < 0.05, took
            await the_node_shows_up(hub, link, capsys)
        blob = POOL.request("GET", f"{hub.url}/blobs/{digest(b'golden')}", headers={"authorization": f"Bearer {token}"})
        assert blob.data == b"golden"


async def push_policy(hub: RunningHub, link: Link, number: int) -> float:
    """Seconds from the API call to the policy's arrival at the node."""
    body = json.dumps({"description": str(number)})
    arrival = asyncio.create_task(next_on(link, "tierline/v1/_t/acme/policy"))
    start = time.perf_counter()
    answer = await asyncio.to_thread(hub.request, "PUT", "/api/v1/policies/acme", body=body)
    assert answer.json() == {"tenant": "acme", "revision": number + 1}
    await arrival
    return time.perf_counter() - start


async def the_node_shows_up(hub: RunningHub, link: Link, capsys: pytest.CaptureFixture[str]) -> None:
    link.publish(f"tierline/v1/{NODE}/up/state", b'{"state":"ready","boot":"b1"}', retain=True)
    link.publish(f"tierline/v1/{NODE}/up/state", b"garbage")
    link.publish("tierline/v1/acme.edge-2/up/state", b'{"state":"ready"}')
    async with asyncio.timeout(10):
        while (await asyncio.to_thread(hub.request, "GET", f"/api/v1/nodes/{NODE}")).json()["state"] != "ready":
            await asyncio.sleep(0.02)
    assert await asyncio.to_thread(hub.run, "nodes") == 0
    assert await asyncio.to_thread(hub.run, "nodes", NODE) == 0
    assert "digits-cnn/1" in capsys.readouterr().out


class Planned(FakeActivator):
    """Fetches what the document names for an engine called onnx."""

    def plan(self, body: bytes, capabilities: Mapping[str, object]) -> Sequence[str]:
        return plan(decode_desired(body), ("onnx",))


def registered(folder: Path, hub: RunningHub, broker: Broker, capsys: pytest.CaptureFixture[str]) -> Membership:
    """An edge node that hub and broker know, with its data below `folder`."""
    credential = write(folder / "credential", register(hub, broker, capsys))
    credential.chmod(0o600)
    return Membership(
        id=NODE,
        tier="edge",
        broker=broker.url,
        sources=(hub.url,),
        root=hub.data / "root.json",
        credential=credential,
        data=folder / "node",
    )


async def test_a_node_fetches_applies_and_reports_until_the_hub_shows_it_in_sync(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with running_broker(tmp_path / "broker") as broker, running_hub(tmp_path, broker) as hub:
        membership = registered(tmp_path, hub, broker, capsys)
        models, policies = Planned(), FakeActivator()
        async with join(
            membership,
            activators={"desired": models, "policy": policies},
            capabilities=Capabilities(tier="edge", engines=("onnx",)),
            running=dict,
            probation=Probation(seconds=0.1, poll=0.02),
        ):
            for version in ("1", "2"):
                folder = package_folder(tmp_path / version, version)
                assert await asyncio.to_thread(hub.run, "publish", str(folder)) == 0
                deploy = ("deploy", "edges", "--model", f"digits=digits-cnn/{version}")
                assert await asyncio.to_thread(hub.run, *deploy) == 0
                assert await asyncio.to_thread(hub.run, "policy", "acme", str(policy_file(tmp_path, version))) == 0
                assert await asyncio.to_thread(hub.run, "policy", "acme") == 0
                assert f'"description": "{version}"' in capsys.readouterr().out
                node = await in_sync(hub)
                assert node["desired"] == {"digits": f"digits-cnn/{version}"}
            assert models.prepared[-1][1][digest(b"model 2")] == b"model 2"
            assert len(models.history) == len(policies.history) == 2


def policy_file(folder: Path, description: str) -> Path:
    return write(folder / "policy.json", json.dumps({"description": description}))


async def in_sync(hub: RunningHub) -> dict[str, Any]:
    async with asyncio.timeout(10):
        while True:
            node = (await asyncio.to_thread(hub.request, "GET", f"/api/v1/nodes/{NODE}")).json()
            if node["in_sync"]:
                return dict(node)
            await asyncio.sleep(0.02)


async def test_a_broker_that_was_killed_and_forgot_is_told_again(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with running_broker(tmp_path / "broker") as broker, running_hub(tmp_path, broker) as hub:
        token = register(hub, broker, capsys)
        hub.request("PUT", "/api/v1/policies/acme", body=b'{"description":"kept"}')
        broker.kill()
        assert hub.request("GET", "/api/v1/packages").status == 200
        broker.start()
        async with node_link(broker, NODE, token) as link:
            await next_on(link, "tierline/v1/_t/acme/policy")


def test_a_hub_killed_at_any_time_starts_again_with_everything(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with running_broker(tmp_path / "broker") as broker:
        with running_hub(tmp_path, broker) as hub:
            assert hub.run("publish", str(package_folder(tmp_path / "v1", "1"))) == 0
            assert hub.run("policy", "acme", str(write(tmp_path / "policy.json", '{"rules": []}'))) == 0
            hub.process.send_signal(signal.SIGKILL)
            hub.process.wait(10)
            (hub.data / "hub.json").unlink()
        with running_hub(tmp_path, broker) as hub:
            assert hub.run("packages") == 0
            assert "digits-cnn/1" in capsys.readouterr().out
            assert hub.request("GET", "/api/v1/policies/acme").json()["revision"] == 1
            assert hub.request("GET", f"/blobs/{digest(b'golden')}").data == b"golden"


def write(path: Path, text: str) -> Path:
    path.write_text(text)
    return path
