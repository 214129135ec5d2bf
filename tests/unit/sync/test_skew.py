"""This release's node, and messages and files of other releases: each works, or is refused in words that say why."""

from __future__ import annotations

import json
from pathlib import Path

import msgspec
import pytest
from skew_fixtures import FOLDER, RELEASES, Release, user_version

from models.desired import decode_desired, digests_of, plan
from models.errors import InvalidManifest
from models.policy import decode_policy
from sync import events, state
from sync.errors import Absent, InvalidConfig, StoreFailed
from sync.identity import Membership, load_config
from sync.messages import Capabilities, Document, Envelope, HubState, Reported, State, decode
from sync.outbox_policy import Quota
from sync.outbox_store import OutboxStore
from sync.settings import decode_settings
from sync.state import StateStore
from sync.trust import Verified, decode_keyring, unseal, verify
from sync.tuf_client import answer
from sync.tuf_messages import Ask

SCOPES = {"desired": "node:demo.edge-1", "settings": "node:demo.edge-1", "policy": "tenant:demo"}


@pytest.fixture(params=RELEASES)
def release(request: pytest.FixtureRequest) -> Release:
    return Release(request.param)


def verified(release: Release, kind: str) -> Verified:
    keyring = decode_keyring(release.read("keyring.json"))
    return verify(release.read(f"{kind}.json"), keyring, kind=kind, scope=SCOPES[kind], floor=0, now=release.at)


def test_a_node_takes_the_documents_of_every_release(release: Release) -> None:
    desired = decode_desired(bytes(verified(release, "desired").document.body))
    assert desired.models["digits"].package == "digits-int8"
    assert len(plan(desired, ("onnx",))) == 3
    assert decode_policy(bytes(verified(release, "policy").document.body)).rules[0].min_confidence == 0.5
    if release.has("settings.json"):
        assert decode_settings(bytes(verified(release, "settings").document.body)).bandwidth == 1e6


def test_what_was_signed_is_verified_with_the_fields_nobody_here_knows(release: Release) -> None:
    envelope = decode(release.read("desired.json"), Envelope)
    assert (b"a_later_field" in envelope.payload) == (release.name == "later")
    assert verified(release, "desired").document.digests == digests_of(
        decode_desired(bytes(verified(release, "desired").document.body))
    )


@pytest.mark.parametrize(
    ("name", "kind"), [("state", State), ("caps", Capabilities), ("reported", Reported), ("hub_state", HubState)]
)
def test_unsigned_messages_of_every_release_are_read(release: Release, name: str, kind: type[msgspec.Struct]) -> None:
    message = decode(release.read(f"{name}.json"), kind)
    known = json.loads(release.read(f"{name}.json"))
    assert {
        field: value for field, value in msgspec.to_builtins(message).items() if field in ("state", "boot", "tier")
    } == {field: value for field, value in known.items() if field in ("state", "boot", "tier")}


def test_a_state_nobody_here_knows_is_shown_as_it_was_said() -> None:
    reported = decode(Release("later").read("reported.json"), Reported)
    assert reported.documents["a_later_kind"].state == "a_later_state"


def test_acknowledgements_and_events_are_read_with_more_in_them() -> None:
    packet = events.unpack(Release("0.1.0").read("event.msgpack"))
    assert events.unpack_event(packet.events[0]).kind == "app.test"
    ids = (events.unpack_event(packet.events[0]).id,)
    assert events.decode_ack(Release("0.1.0").read("ack.json")).ids == ids
    assert events.decode_ack(Release("later").read("ack.json")).ids == ids
    more = msgspec.msgpack.decode(Release("0.1.0").read("event.msgpack"))
    more["events"] = [{**event, "later": 1} for event in more["events"]]
    grown = events.unpack(msgspec.msgpack.encode({**more, "later": 1}))
    assert events.unpack_event(grown.events[0]).kind == "app.test"


def test_what_an_operator_wrote_is_understood_whole_or_refused_by_name() -> None:
    """A rule half obeyed would be worse than the rule before it; what the hub itself writes may carry more."""
    with pytest.raises(Exception, match="later"):
        decode_policy(b'{"rules":[{"model":"m","later":1}]}')
    body = json.loads(decode(Release("0.1.0").read("desired.json"), Envelope).payload)["body"]
    body["models"]["digits"]["variants"][0]["later"] = 1
    with pytest.raises(InvalidManifest, match="later"):
        decode_desired(json.dumps(body).encode())


def test_the_recorded_update_repository_still_lists_what_the_document_names(tmp_path: Path) -> None:
    release = Release("0.1.0")
    digests = verified(release, "desired").document.digests

    def get(path: str, limit: int) -> bytes:
        if not (FOLDER / release.name / "tuf" / path).exists():
            raise Absent(path)
        return release.read(f"tuf/{path}")

    names = ("keys/documents.json", *(f"sha256/{digest.removeprefix('sha256:')}" for digest in digests))
    ask = Ask(
        root=release.read("tuf/1.root.json"), folder=str(tmp_path), now=release.at, floors={}, kept={}, names=names
    )
    found = answer(ask, get)
    assert (found.code, found.files.keys()) == ("", set(names))


# --- files on the disk ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["before-tuf", "0.1.0"])
def test_the_state_of_every_release_is_opened_with_nothing_lost(tmp_path: Path, name: str) -> None:
    release, path = Release(name), tmp_path / "state.db"
    release.restore("state.sql", path)
    for _ in range(2):
        opened = StateStore(path)
        for kind in ("desired", "policy"):
            active = opened.slots(kind, SCOPES[kind]).active
            assert active == release.read(f"{kind}.json")
            floor = opened.floor(kind, SCOPES[kind])
            assert (floor.revision, floor.digest) == (1, unseal(active).digest)
        assert opened.time_floor() > 1.79e9
        opened.close()
        assert user_version(path) == state.SCHEMA


def test_the_state_of_a_later_release_is_refused_by_its_number_and_not_touched(tmp_path: Path) -> None:
    path = tmp_path / "state.db"
    Release("0.1.0").restore("state.sql", path)
    user_version(path, 7)
    before = path.read_bytes()
    with pytest.raises(StoreFailed, match=rf"state\.db has format 7.*reads up to {state.SCHEMA}\b"):
        StateStore(path)
    assert path.read_bytes() == before
    user_version(path, state.SCHEMA)
    StateStore(path).close()


def test_the_outbox_of_this_release_is_opened(tmp_path: Path) -> None:
    path = tmp_path / "outbox.db"
    Release("0.1.0").restore("outbox.sql", path)
    store = OutboxStore(path, Quota(), wall=1.8e9, monotonic=0.0)
    assert store.starts == 2
    assert "update" in store.kinds
    store.close()


def test_a_document_has_no_field_that_the_release_before_would_refuse() -> None:
    """It read documents strictly. Readers of today do not: once it is forgotten, fields may be added."""
    payload = json.loads(decode(Release("before-tuf").read("desired.json"), Envelope).payload)
    assert {field.encode_name for field in msgspec.structs.fields(Document)} == payload.keys()


def test_a_configuration_from_before_tuf_is_refused_by_the_field_that_went(tmp_path: Path) -> None:
    (tmp_path / "node.toml").write_text(
        'id = "demo.edge-1"\ntier = "edge"\nbroker = "mqtt://127.0.0.1:1"\nkeyring = "keyring.json"\n'
        'credential = "token"\ndata = "."\n'
    )
    with pytest.raises(InvalidConfig, match=r"node\.toml: .*(keyring|root)"):
        load_config(tmp_path / "node.toml", Membership)
