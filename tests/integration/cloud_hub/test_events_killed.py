"""Events survive kill -9 of the node, the broker and the hub in mid-stream: none lost, none applied twice, few repetitions."""

from __future__ import annotations

import json
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from cloud_hub.ledger_cli import ledger
from sync.outbox_store import read_ledger
from tests.integration.cloud_hub.test_hub_process import (
    MOSQUITTO,
    NODE,
    Broker,
    RunningHub,
    register,
    running_broker,
    running_hub,
)

CHILD = Path(__file__).parents[1] / "sync" / "events_child.py"
KILLS = 10
DRAIN_SECONDS = 60

pytestmark = [
    pytest.mark.broker,
    pytest.mark.skipif(MOSQUITTO is None, reason="mosquitto is not installed (package mosquitto)"),
]


class Node:
    """The node's process, killed and started again; every start counts on from a fresh thousand."""

    def __init__(self, folder: Path, url: str, token: str) -> None:
        folder.mkdir()
        self.folder, self.url, self.token = folder, url, token
        self.starts = 0
        self.start()

    def start(self, count: int = 5_000) -> None:
        self.starts += 1
        command = [sys.executable, str(CHILD), str(self.folder), self.url, NODE, str(self.starts * 10_000), str(count)]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        assert self.process.stdin is not None
        self.process.stdin.write(self.token.encode() + b"\n")
        self.process.stdin.flush()

    def kill(self) -> None:
        assert self.process.poll() is None, "the node ended by itself"
        self.process.kill()
        self.process.communicate()

    def drain(self) -> int:
        """Until nothing waits; how many events this last process sent again."""
        self.start(count=0)
        out, _ = self.process.communicate(timeout=DRAIN_SECONDS)
        assert self.process.returncode == 0
        return int(out)

    def put(self) -> list[int]:
        """Numbers whose `put` had returned. A line cut off by a kill was written after that too, but says nothing."""
        return [int(line) for line in (self.folder / "put.log").read_text().split("\n")[:-1]]


def every_event(hub: RunningHub) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = []
    after: int | None = 0
    while after is not None:
        page = hub.request("GET", f"/api/v1/events?kind=app.count&limit=200&after={after}").json()
        found += page["items"]
        after = page["next"]
    return found


def restart_hub(hub: RunningHub, folder: Path, broker: Broker) -> RunningHub:
    hub.process.send_signal(signal.SIGKILL)
    hub.process.wait(10)
    (hub.data / "hub.json").unlink()
    return RunningHub(folder, broker)


def test_kill_9_of_node_broker_and_hub_loses_nothing_and_applies_nothing_twice(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    chance = random.Random(7)
    with running_broker(tmp_path / "broker") as broker, running_hub(tmp_path, broker) as first_hub:
        hub = first_hub
        token = register(hub, broker, capsys)
        node = Node(tmp_path / "node", broker.url, token)
        try:
            kills: Counter[str] = Counter()
            for turn in range(KILLS):
                time.sleep(chance.uniform(0.2, 0.5))
                victim = "hub" if turn == KILLS // 2 else "broker" if turn % 5 == 2 else "node"
                kills[victim] += 1
                if victim == "node":
                    node.kill()
                    node.start()
                elif victim == "broker":
                    broker.kill()
                    broker.start()
                else:
                    hub = restart_hub(hub, tmp_path, broker)
            node.kill()
            node.drain()
            put, found = node.put(), every_event(hub)
            theirs = hub.request("GET", f"/api/v1/nodes/{NODE}/ledger").json()["streams"]["app.count"]
        finally:
            if node.process.poll() is None:
                node.process.kill()
                node.process.wait(10)
            hub.process.terminate()
            hub.process.wait(15)
    ours = read_ledger(node.folder / "outbox.db").streams["app.count"]
    numbers = Counter(int(entry["json"]) for entry in found)
    assert kills["node"] >= 5 and kills["broker"] >= 2 and kills["hub"] == 1
    assert len(put) > 300, "too little happened between the kills"
    assert set(put) - set(numbers) == set(), "lost"
    assert [number for number, times in numbers.items() if times > 1] == [], "applied twice"
    assert (ours.enqueued, ours.delivered, ours.pending, ours.lost_count) == (len(found), len(found), 0, 0)
    assert theirs["received"] == len(found)
    repeated = theirs["duplicates"] / theirs["received"]
    assert repeated <= 1
    with capsys.disabled():
        print(f"\n{len(found)} events, {sum(kills.values())} kills, {repeated:.3f} repetitions on the wire per event")
    assert ledger([str(node.folder)]) == 0
    assert "BALANCED" in capsys.readouterr().out
    assert ledger([str(node.folder), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["imbalance"] == {}
