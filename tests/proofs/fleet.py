"""A thousand nodes at once: `python tests/proofs/fleet.py` runs the real broker and hub and simulates the nodes.

A simulated node speaks the real topics and messages and keeps revision floors - in memory, where a real one has a disk - but
loads no models. All of them live in this one process, over MQTT 3.1.1, so a signature is checked once for all nodes that get
the same bytes: a real node has a processor of its own for that (0.15 ms). What must
hold: whether they all connect for the first time, lose their broker, or come back to one that forgot everything while a new
deployment was made, the hub sees every one of them in sync within 60 s, at a bounded cost of the hub's processor. Then a
policy is pushed to part of them and timed from the API call to each node's having verified it.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import random
import resource
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from proofs.mqtt_raw import RawMqtt

from deploy.local import TENANT, Cluster, cluster
from models.zoo import digits
from sync import topics
from sync.channel import LinkOptions, reconnect_delay
from sync.errors import SyncError
from sync.messages import Capabilities, DocumentReport, Reported, State, encode
from sync.trust import Keyring, Verified, decode_keyring, verify

IN_SYNC_SECONDS = 60.0
HUB_CPU_MS = 60.0
"""Processor time of the hub for one node's coming back: 1,000 nodes must not keep one core longer than a minute."""
GIVE_UP_SECONDS = 180.0
PUSHES = 20
PUSH_TENANT = "few"
PUSH_P50_MS, PUSH_P99_MS = 5.0, 50.0
_TICK = os.sysconf("SC_CLK_TCK")


class SimulatedNode:
    """What a node says and believes, without its models."""

    def __init__(self, node_id: str, token: str, fleet: Fleet) -> None:
        self.id, self._token, self._fleet = node_id, token, fleet
        self._tenant = topics.tenant_of(node_id)
        self._kinds = {
            topics.down(node_id, "desired"): ("desired", f"node:{node_id}"),
            topics.tenant_policy(self._tenant): ("policy", f"tenant:{self._tenant}"),
        }
        self._floors: dict[str, tuple[int, str]] = {}
        self._attempt = self._seq = 0
        self._link: RawMqtt | None = None
        self.refused = 0
        self.connected = False

    def start(self) -> None:
        asyncio.get_running_loop().create_task(self._connect())

    async def _connect(self) -> None:
        self._attempt += 1
        will = (topics.up(self.id, "state"), encode(State(state="lost", boot="sim")))
        link = self._link = RawMqtt(self.id, self._token, will, self._up, self._arrived, self._down)
        try:
            await asyncio.get_running_loop().create_connection(lambda: link, "127.0.0.1", self._fleet.port)
        except OSError:
            self._down()

    def _down(self) -> None:
        """Back after the pause that real nodes take, scaled by the fleet's size."""
        self.connected = False
        if self._fleet.over:
            return
        delay = reconnect_delay(max(1, self._attempt), self._fleet.options, self._fleet.rng.uniform)
        asyncio.get_running_loop().call_later(delay, self.start)

    def _up(self) -> None:
        assert self._link is not None
        self._attempt, self.connected = 0, True
        self._link.subscribe(*topics.node_filters(self.id))
        self._say("state", State(state="ready", boot="sim", at=time.time()))
        self._say("caps", Capabilities(tier="edge", engines=("onnx",)))
        self._report()

    def _arrived(self, topic: str, payload: bytes) -> None:
        found = self._kinds.get(topic)
        if found is None:
            return
        kind, scope = found
        floor, _ = self._floors.get(kind, (0, ""))
        verified = self._fleet.verified(payload, kind, scope)
        if verified is None or verified.document.revision < floor:
            self.refused += 1
            return
        self._floors[kind] = (verified.document.revision, verified.digest)
        self._fleet.applied(kind, verified.document.revision)
        self._report()

    def _report(self) -> None:
        self._seq += 1
        documents = {
            kind: DocumentReport(revision=revision, applied=revision, state="applied", digest=digest, at=time.time())
            for kind, (revision, digest) in self._floors.items()
        }
        self._say("reported", Reported(boot="sim", seq=self._seq, documents=documents))

    def _say(self, leaf: str, message: State | Capabilities | Reported) -> None:
        if self._link is not None:
            self._link.publish(topics.up(self.id, leaf), encode(message), retain=True)

    def close(self) -> None:
        if self._link is not None:
            self._link.close()


class Fleet:
    """All simulated nodes. `waiting`: (kind, revision) -> times at which it was verified somewhere."""

    def __init__(self, port: int, size: int, seed: int, keyring: Keyring) -> None:
        self.port, self.over, self.rng, self._keyring = port, False, random.Random(seed), keyring
        self._last: tuple[bytes, Verified | None] = (b"", None)
        self.options = LinkOptions(url="mqtt://127.0.0.1", client_id="sim", fleet_size=size)
        self.nodes: list[SimulatedNode] = []
        self.waiting: dict[tuple[str, int], list[float]] = {}

    @property
    def connected(self) -> int:
        return sum(node.connected for node in self.nodes)

    def verified(self, payload: bytes, kind: str, scope: str) -> Verified | None:
        """The document in `payload`; None when it is refused."""
        if payload != self._last[0]:
            try:
                found = verify(payload, self._keyring, kind=kind, scope=scope, floor=0, now=time.time())
            except SyncError:
                return None
            self._last = (payload, found)
        return self._last[1]

    def applied(self, kind: str, revision: int) -> None:
        times = self.waiting.get((kind, revision))
        if times is not None:
            times.append(time.monotonic())

    def close(self) -> None:
        self.over = True
        for node in self.nodes:
            node.close()


# --- the hub, as its users see it ---------------------------------------------------------------------------------


def register(running: Cluster, ids: Sequence[str]) -> dict[str, str]:
    """Node id -> token."""
    made = {}
    for node_id in ids:
        body = {"id": node_id, "tier": "edge", "labels": {}}
        made[node_id] = str(running.api.call("POST", "/api/v1/nodes", body)["token"])
    admit(running)
    return made


def admit(running: Cluster) -> None:
    access = running.api.call("GET", "/api/v1/broker/access")
    running.broker.admit(access["passwords"], access["acl"])


def in_sync(running: Cluster, wanted: str) -> int:
    """Nodes that the hub holds to be here and in sync with a document that names `wanted`."""
    count, after = 0, ""
    while True:
        page = running.api.call("GET", f"/api/v1/nodes?limit=200&after={after}")
        count += sum(node["in_sync"] and node["state"] == "ready" for node in page["items"])
        if page["next"] is None:
            return count if wanted in _wanted(running) else 0
        after = page["next"]


def _wanted(running: Cluster) -> str:
    first = running.api.call("GET", "/api/v1/nodes?limit=1")["items"][0]["id"]
    return str(running.api.call("GET", f"/api/v1/nodes/{first}")["desired"])


def cpu_seconds(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / _TICK


async def until_in_sync(running: Cluster, fleet: Fleet, wanted: str, began: float) -> float:
    """Seconds from `began` until every node is connected and the hub holds it to be in sync. Raises TimeoutError."""
    count = len(fleet.nodes)
    while time.monotonic() - began < GIVE_UP_SECONDS:
        if fleet.connected == count and await asyncio.to_thread(in_sync, running, wanted) == count:
            return time.monotonic() - began
        await asyncio.sleep(0.5)
    raise TimeoutError(f"not all in sync within {GIVE_UP_SECONDS:g} s")


async def phase(
    running: Cluster, fleet: Fleet, name: str, wanted: str, change: Callable[[], None]
) -> tuple[str, float, float]:
    """(name, seconds until in sync, the hub's processor seconds)."""
    hub = running.processes["hub"].pid
    used = cpu_seconds(hub)
    began = time.monotonic()
    await asyncio.to_thread(change)
    seconds = await until_in_sync(running, fleet, wanted, began)
    return name, seconds, cpu_seconds(hub) - used


async def push(running: Cluster, fleet: Fleet, number: int) -> list[float]:
    """Milliseconds from the API call to verified, over all nodes of the small tenant, for one policy after another."""
    found: list[float] = []
    few = sum(node.id.startswith(f"{PUSH_TENANT}.") for node in fleet.nodes)
    revision = 0
    for index in range(number):
        rules = [{"model": digits.MODEL, "tier": "edge", "min_confidence": 0.1 + index / 1000}]
        times: list[float] = []
        for candidate in range(revision + 1, revision + 4):
            fleet.waiting["policy", candidate] = times
        began = time.monotonic()
        body = {"rules": rules}
        made = await asyncio.to_thread(running.api.call, "PUT", f"/api/v1/policies/{PUSH_TENANT}", body)
        revision = int(made["revision"])
        while len(times) < few and time.monotonic() - began < 5:
            await asyncio.sleep(0.002)
        found += [(at - began) * 1e3 for at in times]
        fleet.waiting.clear()
        await asyncio.sleep(0.1)
    return found


async def prove(running: Cluster, size: int, seed: int) -> int:
    few = min(100, size // 2)
    ids = [f"{PUSH_TENANT}.n{index}" for index in range(few)] + [f"{TENANT}.n{index}" for index in range(size - few)]
    tokens = await asyncio.to_thread(register, running, ids)
    keyring = decode_keyring((running.hub_data / "keys" / "documents.json").read_bytes())
    fleet = Fleet(running.broker.port, size, seed, keyring)
    fleet.nodes = [SimulatedNode(node_id, token, fleet) for node_id, token in tokens.items()]
    loop, package = asyncio.get_running_loop(), digits.PACKAGES["edge"]

    def deploy(version: str) -> None:
        for tenant in (TENANT, PUSH_TENANT):
            body = {"tenant": tenant, "selector": {"tier": "edge"}, "models": {digits.MODEL: f"{package}/{version}"}}
            running.api.call("PUT", f"/api/v1/deployments/digits-{tenant}", body)

    def begin() -> None:
        for node in fleet.nodes:
            loop.call_soon_threadsafe(node.start)

    def restart(*, forget: bool) -> None:
        running.broker.kill()
        if forget:
            running.broker.forget()
            deploy("2")
        running.broker.start()
        admit(running)

    deploy("1")
    try:
        rows = [
            await phase(running, fleet, "all connect for the first time", f"{package}/1", begin),
            await phase(running, fleet, "broker killed and back", f"{package}/1", lambda: restart(forget=False)),
            await phase(
                running,
                fleet,
                "broker back without its memory, new deployment",
                f"{package}/2",
                lambda: restart(forget=True),
            ),
            await phase(running, fleet, "a deployment for all", f"{package}/1", lambda: deploy("1")),
        ]
        times = sorted(await push(running, fleet, PUSHES))
    finally:
        fleet.close()
    return show(rows, times, size, few, sum(node.refused for node in fleet.nodes))


def show(rows: list[tuple[str, float, float]], times: list[float], size: int, few: int, refused: int) -> int:
    print(f"{size} simulated nodes, floors in memory")
    good = True
    for name, seconds, hub in rows:
        per_node = hub / size * 1e3
        good &= seconds <= IN_SYNC_SECONDS and per_node <= HUB_CPU_MS
        print(f"  {name:48s} in sync after {seconds:5.1f} s; hub {hub:5.1f} s of CPU ({per_node:.1f} ms a node)")
    p50, p99 = statistics.median(times), times[int(len(times) * 0.99)]
    complete = len(times) == PUSHES * few
    print(
        f"  policy to {few} nodes of one tenant: p50 {p50:.1f} ms, p99 {p99:.1f} ms ({len(times)} of {PUSHES * few} arrived)"
    )
    print(f"  documents refused by the nodes: {refused}")
    return 0 if good and complete and p50 <= PUSH_P50_MS and p99 <= PUSH_P99_MS else 1


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--nodes", type=int, default=1000, help="simulated nodes (default %(default)s)")
    parser.add_argument("--seed", type=int, default=1)
    arguments = parser.parse_args()
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(hard, max(soft, 4 * arguments.nodes + 256)), hard))
    with tempfile.TemporaryDirectory() as folder, cluster(Path(folder)) as running:
        running.start_broker()
        running.start_hub()
        for version in digits.VERSIONS:
            running.publish(digits.package_folder("edge", version))
        return asyncio.run(prove(running, arguments.nodes, arguments.seed))


if __name__ == "__main__":
    sys.exit(main())
