"""Record what this release says and keeps: real processes, their messages and files, as fixtures for later releases.

    python tests/skew/record.py tests/data/skew/0.1.0               this tree
    PYTHONPATH=OTHER_TREE python tests/skew/record.py FOLDER        another one, its own code in every process
    python tests/skew/record.py --later FOLDER FROM                 what a later release might say, made from a recording

A hub, an edge node and a real broker exchange one deployment and one policy; databases are kept as SQL text.
"""

from __future__ import annotations

import argparse
import json
import sqlite3
import time
from contextlib import closing
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any
from urllib.parse import urlsplit

import urllib3
from paho.mqtt.client import Client
from paho.mqtt.enums import CallbackAPIVersion

from deploy.local import TENANT, Cluster, cluster
from deploy.processes import free_port, wait_until
from models.zoo import digits
from sync.messages import Envelope, decode, encode
from sync.topics import HUB_STATE, HUB_USER, down, hub_filters, tenant_policy
from sync.trust import Keyring, SigningKey, decode_keyring, encode_keyring

NODE = f"{TENANT}.edge-1"
WAIT_SECONDS = 60.0
LATER_FIELD = "a_later_field"
LATER_VALUE = {"of": ["a", "later", "release"]}
LATER_KEY = SigningKey.from_bytes(b"\3" * 32)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("source", type=Path, nargs="?")
    parser.add_argument("--later", action="store_true")
    options = parser.parse_args()
    options.folder.mkdir(parents=True, exist_ok=True)
    if options.later:
        make_later(options.source, options.folder)
    else:
        with TemporaryDirectory() as scratch:
            record(Path(scratch), options.folder)
    return 0


def record(scratch: Path, into: Path) -> None:
    with cluster(scratch) as site:
        site.start_broker()
        site.start_hub()
        site.urls["cloud-1"] = f"http://127.0.0.1:{free_port()}"  # nobody is above; the edge answers by itself
        site.start_edge()
        site.publish(digits.package_folder("device"))
        site.deploy("digits", "edge", digits.MODEL, digits.PACKAGES["device"], digits.VERSIONS[0])
        rules = [{"model": digits.MODEL, "tier": "edge", "min_confidence": 0.5}]
        site.api.call("PUT", f"/api/v1/policies/{TENANT}", {"rules": rules})
        has_settings = settings(site)
        kinds = ("desired", "policy", *(("settings",) if has_settings else ()))
        wait_until("all is applied", lambda: all(applied(site, kind) for kind in kinds), WAIT_SECONDS)
        node = site.api.call("POST", "/api/v1/nodes", {"id": f"{TENANT}.reader", "tier": "edge", "labels": {}})
        access = site.api.call("GET", "/api/v1/broker/access")
        site.broker.admit(access["passwords"], access["acl"])
        keep_metadata(site, node["token"], into)
        found = retained(site, f"{TENANT}.reader", node["token"], (HUB_STATE,))
        site.processes["hub"].stop()
        password = site.broker.hub_password.read_text().strip()
        topics = (*hub_filters(), down(NODE, "desired"), tenant_policy(TENANT), f"tierline/v1/{NODE}/down/settings")
        found |= {
            topic: data for topic, data in retained(site, HUB_USER, password, topics).items() if topic != HUB_STATE
        }
        site.processes["edge-1"].stop()
        for topic, payload in found.items():
            (into / f"{name_of(topic)}.json").write_bytes(payload)
        for path in (scratch / "hub" / "hub.sqlite", scratch / "edge-1" / "state.db", scratch / "edge-1" / "outbox.db"):
            if path.exists():
                (into / f"{path.stem}.sql").write_text(dump(path))
    events(into)
    (into / "recorded.json").write_text(json.dumps({"node": NODE, "at": time.time()}, indent=2) + "\n")


def settings(site: Cluster) -> bool:
    """Whether this release has settings."""
    answer = urllib3.request("GET", f"{site.urls['hub']}/openapi.json")
    if answer.status == 200 and "/api/v1/settings/{tenant}" not in answer.json().get("paths", {}):
        return False
    try:
        site.api.call("PUT", f"/api/v1/settings/{TENANT}", {"bandwidth": 1e6})
    except Exception:  # noqa: BLE001 - a release without them answers 404
        return False
    return True


def applied(site: Cluster, kind: str) -> bool:
    entry = site.node("edge-1")["documents"].get(kind)
    return entry is not None and entry["revision"] > 0 and entry["applied"] == entry["revision"]


def keep_metadata(site: Cluster, token: str, into: Path) -> None:
    """The keyring, and the list of approved files in the form this release has."""
    hub = site.hub_data
    if (hub / "keyring.json").exists():
        (into / "keyring.json").write_bytes((hub / "keyring.json").read_bytes())
        headers = {"authorization": f"Bearer {token}"}
        (into / "catalog.json").write_bytes(urllib3.request("GET", f"{site.urls['hub']}/catalog", headers=headers).data)
        return
    (into / "keyring.json").write_bytes((hub / "keys" / "documents.json").read_bytes())
    (into / "tuf").mkdir(exist_ok=True)
    newest = max(int(path.name.partition(".")[0]) for path in (hub / "tuf").glob("*.snapshot.json"))
    for path in sorted((hub / "tuf").glob("*.json")):
        if path.name.endswith(".snapshot.json") and path.name != f"{newest}.snapshot.json":
            continue
        # Most of the bins list nothing; one of those is kept too.
        signed = json.loads(path.read_bytes())["signed"]
        if ".bin-" not in path.name or signed.get("targets") or path.name.endswith(".bin-00.json"):
            (into / "tuf" / path.name).write_bytes(path.read_bytes())


def retained(site: Cluster, user: str, password: str, topics: tuple[str, ...]) -> dict[str, bytes]:
    """What the broker keeps under `topics`."""
    found: dict[str, bytes] = {}
    client = Client(CallbackAPIVersion.VERSION2, client_id=user)
    client.username_pw_set(user, password)
    client.on_connect = lambda *_: client.subscribe([(topic, 1) for topic in topics])
    client.on_message = lambda _client, _data, message: found.__setitem__(message.topic, message.payload)
    address = urlsplit(site.broker.url)
    client.connect(str(address.hostname), int(address.port or 0))
    client.loop_start()
    time.sleep(2.0)
    client.disconnect()
    client.loop_stop()
    return {topic: payload for topic, payload in found.items() if payload}


def name_of(topic: str) -> str:
    return "hub_state" if topic == HUB_STATE else topic.rpartition("/")[2]


def dump(path: Path) -> str:
    with closing(sqlite3.connect(path)) as db:
        version = db.execute("PRAGMA user_version").fetchone()[0]
        return "\n".join([*db.iterdump(), f"PRAGMA user_version={version};"]) + "\n"


def events(into: Path) -> None:
    """A packet of events and its acknowledgement, where this release has them."""
    from sync import events as wire
    from sync import messages

    if Path(str(wire.__file__)).parent != Path(str(messages.__file__)).parent:
        return  # an editable install offers this tree's file where the other tree has none
    event = wire.Event(id=wire.new_id(1.8e9, b"\0" * 10), seq=1, kind="app.test", body=b'{"n":1}', at=1.8e9)
    packet = wire.EventPacket(boot="0" * 16, starts=1, low=1, events=(wire.pack_event(event),))
    (into / "event.msgpack").write_bytes(wire.pack(packet))
    (into / "ack.json").write_bytes(encode(wire.Ack(ids=(event.id,))))


# --- a later release ------------------------------------------------------------------------------------------------


def make_later(source: Path, into: Path) -> None:
    """Everything of `source` with a field more wherever a release may add one, a higher `v`, signed by a key of its own."""
    ring = decode_keyring((source / "keyring.json").read_bytes())
    kinds = tuple({kind for key in ring.keys for kind in key.kinds})
    keyring = json.loads(encode_keyring(Keyring((LATER_KEY.key(*kinds),))))
    keyring["keys"] = [grown(key) for key in keyring["keys"]]
    write(into / "keyring.json", grown(keyring))
    for name in ("reported", "caps", "state", "hub_state", "ack"):
        message = {**json.loads((source / f"{name}.json").read_bytes()), "v": 2}
        if name == "reported":
            message["documents"] = {kind: grown(report) for kind, report in message["documents"].items()}
            message["documents"]["a_later_kind"] = grown({"revision": 1, "applied": 1, "state": "a_later_state"})
        write(into / f"{name}.json", grown(message))
    for kind in ("desired", "policy", "settings"):
        envelope = decode((source / f"{kind}.json").read_bytes(), Envelope)
        document = json.loads(envelope.payload)
        if kind == "desired":
            models = document["body"]["models"]
            document["body"] = grown({"models": {name: grown(entry) for name, entry in models.items()}})
        elif kind == "settings":
            document["body"] = grown(document["body"])
        payload = json.dumps(grown(document)).encode()
        sealed = json.loads(encode(Envelope(payload, (LATER_KEY.sign(payload),))))
        sealed["sigs"] = [grown(signature) for signature in sealed["sigs"]]
        write(into / f"{kind}.json", grown(sealed))
    (into / "recorded.json").write_bytes((source / "recorded.json").read_bytes())


def grown(value: dict[str, Any]) -> dict[str, Any]:
    return {**value, LATER_FIELD: LATER_VALUE}


def write(path: Path, value: object) -> None:
    path.write_text(json.dumps(value) + "\n")


if __name__ == "__main__":
    raise SystemExit(main())
