"""A node's folder as a running node leaves it, for tests that break it."""

from __future__ import annotations

import json
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import msgspec

from sync.doctor.subject import NodeSubject
from sync.identity import Membership
from sync.messages import Document
from sync.outbox_policy import Quota as OutboxQuota
from sync.outbox_store import Change, Entry, OutboxStore
from sync.state import Approval, StateStore
from sync.testing import FakeClock
from sync.trust import Keyring, SigningKey, Verified, digest_of, encode_keyring, sign
from sync.tuf_messages import Mark

NODE = "acme.edge-1"
NOW = 1_800_000_000.0
DAY = 86_400.0
SIGNER = SigningKey.from_bytes(b"\7" * 32)
BLOB = b"what a document names"
CANARY = "canary-9f2b7c41d6"


def metadata(kind: str, version: int, seconds: float) -> bytes:
    """As TUF has it, as far as a doctor looks."""
    expires = datetime.fromtimestamp(NOW + seconds, UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
    return json.dumps({"signed": {"_type": kind, "version": version, "expires": expires}, "signatures": []}).encode()


def make_node(folder: Path, *, broker: str = "mqtt://127.0.0.1:1", sources: tuple[str, ...] = ()) -> NodeSubject:
    """A node with one document in force, fresh metadata and an outbox that balances; its token is the canary."""
    data = folder / "data"
    data.mkdir(parents=True)
    (folder / "root.json").write_bytes(metadata("root", 1, 365 * DAY))
    (folder / "token").write_text(CANARY)
    (folder / "token").chmod(0o600)
    (folder / "node.toml").write_text(
        f'[node]\nid = "{NODE}"\ntier = "edge"\nbroker = "{broker}"\nroot = "root.json"\n'
        f'credential = "token"\ndata = "data"\nsources = {json.dumps(list(sources))}\n'
    )
    fill(data)
    return subject_in(folder, broker, sources)


def subject_in(folder: Path, broker: str, sources: tuple[str, ...] = (), **more: Any) -> NodeSubject:
    membership = Membership(
        id=NODE,
        tier="edge",
        broker=broker,
        root=folder / "root.json",
        credential=folder / "token",
        data=folder / "data",
        sources=sources,
    )
    fields: dict[str, Any] = {
        "membership": membership,
        "plan": lambda body: (digest_of(BLOB),),
        "clock": FakeClock(NOW),
        "environ": {},
    }
    return NodeSubject(folder / "node.toml", **(fields | more))


def fill(data: Path) -> None:
    ring = encode_keyring(Keyring((SIGNER.key("desired", "policy"),)))
    state = StateStore(data / "state.db")
    state.approve(Approval(NOW + DAY, NOW - 60, digest_of(ring), ring))
    marks = {role: Mark(5, "k") for role in ("timestamp", "snapshot")}
    kept = {role: metadata(role, 5, 7 * DAY) for role in marks}
    state.raise_tuf(marks, kept, NOW - 60)
    body = msgspec.Raw(b'{"models":{}}')
    document = Document("desired", f"node:{NODE}", 3, NOW - 100, (digest_of(BLOB),), body)
    envelope = sign(document, [SIGNER])
    verified = Verified(document, digest_of(msgspec.json.encode(document)))
    state.accept(verified, envelope)
    state.activate(verified, envelope)
    state.close()
    (data / "blobs").mkdir()
    (data / "staging").mkdir()
    (data / "blobs" / digest_of(BLOB).removeprefix("sha256:")).write_bytes(BLOB)
    (data / "format").write_text("1\n")
    outbox = OutboxStore(data / "outbox.db", OutboxQuota(), wall=NOW, monotonic=0.0)
    entry = Entry(id="e1", kind="alarm", body=b"{}", priority=5, last=False, at=NOW, ttl=None)
    outbox.apply(Change(entries=(entry,)), wall=NOW, monotonic=0.0)
    outbox.close()
