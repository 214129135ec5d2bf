"""The commands of the page on identities, as processes: a hub, a broker, an edge node that joins, is seen, and leaves."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from deploy.broker import find_mosquitto
from deploy.processes import Process, announced, free_port, tierline, wait_until

pytestmark = [
    pytest.mark.broker,
    pytest.mark.skipif(find_mosquitto() is None, reason="mosquitto is not installed: the commands were NOT tested"),
]
NODE = "acme.gateway-1"


class Commands:
    def __init__(self, folder: Path, stack: ExitStack) -> None:
        self.folder = folder
        self._stack = stack
        self._env: dict[str, str] = {}

    def start(self, name: str, *arguments: str, env: dict[str, str] | None = None) -> Process:
        process = Process(name, tierline(*arguments), self.folder / f"{name}.log", env=env)
        self._stack.callback(process.stop)
        return process

    def run(self, *arguments: str, expect: int = 0, text: str = "") -> str:
        environment = {**os.environ, **self._env}
        done = subprocess.run(
            tierline(*arguments), capture_output=True, text=True, timeout=30, input=text, env=environment, check=False
        )
        assert done.returncode == expect, done.stdout + done.stderr
        return done.stdout + done.stderr

    def speak_to(self, url: str, data: Path) -> None:
        self._env = {
            "TIERLINE_HUB": url,
            "TIERLINE_HUB_CA": str(data / "tls" / "ca.pem"),
            "TIERLINE_TOKEN_FILE": str(data / "admin.token"),
        }


@pytest.fixture
def commands(tmp_path: Path) -> Iterator[Commands]:
    with ExitStack() as stack:
        yield Commands(tmp_path, stack)


def test_the_commands_of_the_page_do_what_it_says(commands: Commands, tmp_path: Path) -> None:
    data, secure, plain = tmp_path / "hub", free_port(), free_port()
    broker = f"mqtts://127.0.0.1:{secure}"
    names = ("--public-name", "127.0.0.1")
    hub = commands.start(
        "hub", "hub", "--data", str(data), "--http-port", "0", *names, "--broker", broker, "--public-broker", broker
    )
    url = str(announced(hub, data / "hub.json")["url"])
    assert url.startswith("https://")
    commands.speak_to(url, data)
    own = ("--hub", url, "--hub-ca", str(data / "tls" / "ca.pem"), "--token-file", str(data / "admin.token"))
    ports = ("--port", str(plain), "--tls-port", str(secure), "--tls-bind", "127.0.0.1")
    commands.start("broker", "broker", str(tmp_path / "broker"), *own, *names, *ports)

    token = commands.run("hub", "enrol", NODE, "--tier", "edge", "--group", "line-2").strip()
    folder = tmp_path / "gateway"
    said = commands.run("edge", "join", url, "--token", "-", "--folder", str(folder), text=token)
    assert f"next: tierline edge {folder / 'node.toml'}" in said
    assert "used before" in commands.run(
        "edge", "join", url, "--token", token, "--folder", str(tmp_path / "copy"), expect=1
    )
    edge = commands.start("edge", "edge", str(folder / "node.toml"), "--http-port", "0")
    announced(edge, folder / "data" / "edge.json")
    wait(lambda: "ready" in commands.run("nodes", NODE))

    assert "refused" in commands.run("hub", "revoke", NODE, "--reason", "stolen")
    assert "stolen" in commands.run("hub", "denied")
    wait(lambda: "link to" in (log := edge.log.read_text()) and "is down" in log)
    assert edge.alive, "a revoked node still serves its own callers"
    edge.stop()
    assert "revoked" in commands.run("edge", "leave", str(folder / "node.toml"))
    assert not (folder / "identity").exists()
    assert "yes" in commands.run("hub", "authority")
    commands.run("hub", "authority", "next")
    assert "more days" in commands.run("hub", "authority", "switch", expect=1)
    commands.run("hub", "decommission", NODE)
    assert NODE not in commands.run("nodes")
    assert json.loads((data / "hub.json").read_text())["url"] == url


def wait(check: Callable[[], bool], seconds: float = 30.0) -> None:
    wait_until("it happened", check, seconds)
