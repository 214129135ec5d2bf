"""Malformed control-plane messages: `python tests/proofs/messages.py` sends 10,000 to a real hub and a real edge node.

Seeded and bounded. They travel through the real broker, under a user who may write everywhere, so nothing but the receivers'
own checks stands in the way. Half are noise; half are captured messages with wounds, replays, and well-signed documents of
somebody else. What must hold: hub and edge live, nothing is put in force that the hub did not say, the edge answers inference
all the while, memory goes back to its level, and afterwards a policy and an update arrive as ever.
"""

from __future__ import annotations

import argparse
import base64
import json
import random
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from threading import Event
from typing import Any

import paho.mqtt.client as paho
from paho.mqtt.enums import CallbackAPIVersion

from deploy.broker import _hash as password_hash
from deploy.local import TENANT, Cluster, cluster
from deploy.predict import predict
from deploy.processes import wait_until
from models.zoo import digits
from sync import topics

STRANGER = "_stranger"
EDGE = "edge-1"
NODE = f"{TENANT}.{EDGE}"
GOOD_EVERY = 100
"""Messages between two inferences that must be answered."""
PAUSE_EVERY, PAUSE_SECONDS = 50, 0.02
"""The receivers keep at most 1,000 waiting and drop beyond: slow enough that each message is really looked at."""
WARM_UP = 0.3
MEMORY_GROWTH = 0.05
SETTLE_SECONDS = 5.0
CAPTURE_SECONDS = 10.0


class Stranger:
    """A connection of its own to the broker. `captured`: topic -> the last message seen there."""

    def __init__(self, host: str, port: int, password: str) -> None:
        self.captured: dict[str, bytes] = {}
        self._up = Event()
        self._client = paho.Client(CallbackAPIVersion.VERSION2, STRANGER)
        self._client.username_pw_set(STRANGER, password)
        self._client.max_queued_messages_set(0)
        self._client.on_connect = self._on_connect
        self._client.on_message = self._on_message
        self._client.connect(host, port)
        self._client.loop_start()
        if not self._up.wait(CAPTURE_SECONDS):
            raise RuntimeError("the stranger is not let in by the broker")

    def _on_connect(self, client: paho.Client, *arguments: Any) -> None:
        client.subscribe(f"{topics.ROOT}/#", qos=1)
        self._up.set()

    def _on_message(self, client: paho.Client, data: object, message: paho.MQTTMessage) -> None:
        self.captured[message.topic] = bytes(message.payload)

    def send(self, topic: str, payload: bytes) -> None:
        self._client.publish(topic, payload, qos=0)

    def close(self) -> None:
        self._client.disconnect()
        self._client.loop_stop()


def targets(node: str) -> list[str]:
    """Every topic that somebody reads."""
    tenant = topics.tenant_of(node)
    return [
        *(topics.down(node, leaf) for leaf in topics.DOWN),
        *(topics.up(node, leaf) for leaf in topics.UP),
        topics.tenant_policy(tenant),
        topics.HUB_STATE,
        topics.up(f"{tenant}.nobody", "reported"),
    ]


# --- what is sent -------------------------------------------------------------------------------------------------

NOISE = (
    b"", b"{", b"null", b"[]", b"0", b'""', b"\xff\xfe", b"\x00" * 64, b"[" * 16_384, b'{"a":' * 4_000, b"{}" * 100,
    b'{"v":1e999}', b'{"v":NaN}', b'{"v":' + b"9" * 5_000 + b"}", b'{"payload":"!","sigs":[]}', b'{"payload":"","sigs":[]}',
    b'{"payload":"e30=","sigs":[{"kid":"","sig":""}]}', b'{"state":"\\ud800"}', b'{"state":' + b'"x"' * 2 + b"}",
    b"a" * 65_000, b"a" * 70_000, b'{"documents":{"desired":{"revision":-1}}}', b'{"seq":true,"boot":[]}',
)  # fmt: skip
WRONG: tuple[object, ...] = (
    None,
    True,
    -1,
    2**70,
    1.5e308,
    "",
    "x" * 300,
    [],
    [[]],
    {},
    {"x": {"x": {}}},
    "\u0000",
    "../../etc/passwd",
)


def messages(captured: dict[str, bytes], rng: random.Random) -> Iterator[tuple[str, str, bytes]]:
    """(kind, topic, payload), without end."""
    places, seeds = targets(NODE), sorted(captured.items())
    while True:
        place = rng.choice(places)
        topic, payload = rng.choice(seeds)
        yield "noise", place, rng.choice(NOISE)
        yield "random bytes", place, rng.randbytes(rng.choice((1, 8, 100, 3_000)))
        yield "wounded", topic, _wounded(payload, rng)
        yield "a field of a wrong kind", topic, _refilled(payload, rng)
        yield "in the wrong place", place if place != topic else topics.HUB_STATE, payload
        yield "payload of a document wounded under its signature", topic, _forged(payload, rng)


def _wounded(payload: bytes, rng: random.Random) -> bytes:
    data = bytearray(payload or b"{}")
    for _ in range(rng.randint(1, 3)):
        at = rng.randrange(len(data) or 1)
        match rng.randrange(4):
            case 0:
                data[at : at + 1] = rng.randbytes(1)
            case 1:
                del data[at : at + rng.randint(1, 30)]
            case 2:
                data[at:at] = rng.choice((b"{", b"]", b'"', b"\\u0000", b",,", b"\xc3"))
            case _:
                del data[at:]
    return bytes(data)


def _refilled(payload: bytes, rng: random.Random) -> bytes:
    """A JSON object with one value, at any depth, of another kind or gone."""
    try:
        root = json.loads(payload)
    except ValueError:
        return b"{}"
    inner = root
    while isinstance(inner, dict) and inner:
        key = rng.choice(sorted(inner))
        if not isinstance(inner[key], dict) or not inner[key] or rng.random() < 0.4:
            if rng.random() < 0.15:
                del inner[key]
            else:
                inner[key] = rng.choice(WRONG)
            break
        inner = inner[key]
    return json.dumps(root).encode()


def _forged(payload: bytes, rng: random.Random) -> bytes:
    """An envelope whose document says something else than was signed."""
    try:
        envelope = json.loads(payload)
        document = json.loads(base64.b64decode(envelope["payload"]))
    except (ValueError, KeyError, TypeError):
        return b'{"payload":"e30=","sigs":[{"kid":"0000000000000000","sig":"' + b"A" * 88 + b'"}]}'
    document[rng.choice(sorted(document))] = rng.choice((*WRONG, document.get("revision", 1) + 1))
    envelope["payload"] = base64.b64encode(json.dumps(document).encode()).decode()
    return json.dumps(envelope).encode()


# --- what must hold -----------------------------------------------------------------------------------------------


def resident(cluster_: Cluster, name: str) -> int:
    """Bytes, the lowest of some readings."""
    readings = []
    for _ in range(20):
        readings.append(int(Path(f"/proc/{cluster_.processes[name].pid}/statm").read_text().split()[1]) * 4096)
        time.sleep(0.05)
    return min(readings)


def answers(cluster_: Cluster) -> bool:
    images, _ = digits.held_out()
    outputs, _ = predict(cluster_.urls[EDGE], digits.MODEL, images[:1], min_confidence=0.0)
    return outputs.shape == (1, 10)


def in_force(cluster_: Cluster) -> tuple[str, int]:
    """The package that runs, and the policy's revision, as the edge reports it."""
    reported = cluster_.node(EDGE).get("reported") or {}
    policy = reported.get("documents", {}).get("policy") or {}
    return reported.get("running", {}).get(digits.MODEL, ""), int(policy.get("applied", 0))


def deploy(cluster_: Cluster, version: str) -> None:
    package = digits.PACKAGES["edge"]
    cluster_.deploy("digits", "edge", digits.MODEL, package, version)
    wait_until(f"{package}/{version} runs", lambda: in_force(cluster_)[0] == f"{package}/{version}", 60.0)


def set_policy(cluster_: Cluster, threshold: float) -> None:
    rules = [{"model": digits.MODEL, "tier": "edge", "min_confidence": threshold}]
    made = cluster_.api.call("PUT", f"/api/v1/policies/{TENANT}", {"rules": rules})
    wait_until("the policy is applied", lambda: in_force(cluster_)[1] >= made["revision"], 60.0)


def attack(cluster_: Cluster, stranger: Stranger, count: int, seed: int) -> dict[str, Any]:
    rng, sent, failures = random.Random(seed), Counter[str](), 0
    stream, level = messages(dict(stranger.captured), rng), {}
    for index in range(count):
        kind, topic, payload = next(stream)
        stranger.send(topic, payload)
        sent[kind] += 1
        if index % PAUSE_EVERY == 0:
            time.sleep(PAUSE_SECONDS)
        if index % GOOD_EVERY == 0:
            failures += not answers(cluster_)
        if index == int(count * WARM_UP):
            level = {name: resident(cluster_, name) for name in ("hub", EDGE)}
    time.sleep(SETTLE_SECONDS)
    growth = {name: resident(cluster_, name) / before - 1 for name, before in level.items()}
    return {"sent": sent, "inferences failed": failures, "growth": growth}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=10_000, help="messages (default %(default)s)")
    parser.add_argument("--seed", type=int, default=1)
    arguments = parser.parse_args()
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as folder, cluster(Path(folder)) as running:
        return prove(running, arguments.count, arguments.seed, began)


def prove(running: Cluster, count: int, seed: int, began: float) -> int:
    running.start_broker()
    running.start_hub()
    for version in digits.VERSIONS:
        running.publish(digits.package_folder("edge", version))
    running.urls["cloud-1"] = "http://127.0.0.1:9"  # nothing listens on the discard port
    running.start_edge(EDGE)
    deploy(running, "1")
    set_policy(running, 0.5)
    password = "of a stranger who may write everywhere"
    access = running.api.call("GET", "/api/v1/broker/access")
    running.broker.admit(
        f"{access['passwords']}{STRANGER}:{password_hash(password)}\n",
        f"{access['acl']}user {STRANGER}\ntopic readwrite {topics.ROOT}/#\n",
    )
    stranger = Stranger("127.0.0.1", running.broker.port, password)
    time.sleep(1.0)  # the retained messages come
    before = in_force(running)
    found = attack(running, stranger, count, seed)
    stranger.close()
    for process in ("hub", EDGE):
        assert running.processes[process].alive, f"{process} died\n{running.processes[process].tail()}"
    after, healing = in_force(running), time.monotonic()
    deploy(running, "2")
    set_policy(running, 0.6)
    healed = time.monotonic() - healing
    print(f"{sum(found['sent'].values())} malformed messages in {time.monotonic() - began:.0f} s (seed {seed})")
    for kind, number in found["sent"].most_common():
        print(f"  {number:6d}  {kind}")
    print(f"deaths: 0; in force before {before}, after {after}; inferences failed: {found['inferences failed']}")
    print("; ".join(f"{name}: memory {growth:+.1%}" for name, growth in found["growth"].items()))
    print(f"afterwards an update and a policy arrived, in {healed:.0f} s")
    grown = any(growth > MEMORY_GROWTH for growth in found["growth"].values())
    return 1 if found["inferences failed"] or grown or before[0] != after[0] else 0


if __name__ == "__main__":
    sys.exit(main())
