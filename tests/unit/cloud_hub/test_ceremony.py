"""Keys are made, moved offline, rotated and withdrawn by commands; the metadata that follows is what a node accepts."""

from __future__ import annotations

import json
import shutil
import stat
from pathlib import Path

import pytest

from cloud_hub import tuf_metadata as tuf
from cloud_hub.keys import open_keys
from cloud_hub.keys_cli import keys
from cloud_hub.tuf_repository import Repository
from sync.errors import Absent, Malformed
from sync.testing import FakeClock
from sync.trust import decode_keyring, digest_of, encode_keyring
from sync.tuf_client import answer
from sync.tuf_messages import Answer, Ask, Mark

FILE = digest_of(b"file")


class Ceremony:
    """A hub's folder, the folder of its root keys, and a node that pinned the first root."""

    def __init__(self, folder: Path) -> None:
        self.data, self.offline, self.node = folder / "hub", folder / "usb", folder / "node"
        self.clock = FakeClock(1_795_000_000.0)
        self.marks: dict[str, Mark] = {}

    def run(self, command: str, *arguments: object, expect: int = 0) -> None:
        options = [] if command == "sign" else ["--data", str(self.data)]
        assert keys([command, *options, *map(str, arguments)]) == expect

    def start(self) -> Repository:
        """The hub's next start."""
        made = open_keys(self.data)
        ring = encode_keyring(made.keyring())
        repository = Repository(self.data, made, self.clock)
        repository.publish({FILE: 10}, (digest_of(ring), len(ring)))
        return repository

    def follow(self, repository: Repository) -> Answer:
        """The node's next refresh."""

        def get(path: str, limit: int) -> bytes:
            data = repository.read(path)
            if data is None:
                raise Absent(path)
            return data

        name = f"sha256/{FILE.removeprefix('sha256:')}"
        told = answer(
            Ask(
                root=(self.data.parent / "pinned.json").read_bytes(),
                folder=str(self.node),
                now=self.clock.wall(),
                floors=self.marks,
                kept={},
                names=(name, tuf.KEYRING),
            ),
            get,
        )
        assert (told.code, told.text) == ("", "")
        assert set(told.files) == {name, tuf.KEYRING}
        self.marks |= told.marks
        return told


@pytest.fixture
def ceremony(tmp_path: Path) -> Ceremony:
    made = Ceremony(tmp_path)
    made.run("init", "--offline", made.offline)
    shutil.copy(made.data / "root.json", tmp_path / "pinned.json")
    return made


def test_root_keys_made_offline_never_touch_the_hub_and_the_rest_is_private(ceremony: Ceremony) -> None:
    here = {path.name for path in (ceremony.data / "keys").glob("*.key")}
    assert here == {"targets.key", "bins.key", "snapshot.key", "timestamp.key", "documents.key"}
    assert {path.name for path in ceremony.offline.iterdir()} == {"root-1.key", "root-2.key", "root-3.key"}
    for path in (*ceremony.offline.iterdir(), *(ceremony.data / "keys").glob("*.key")):
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
    repository = ceremony.start()
    assert repository.problems() == []
    ceremony.follow(repository)
    ceremony.run("init", expect=1)


@pytest.mark.parametrize("role", ["documents", "bins"])
def test_keys_below_targets_are_rotated_without_the_root(ceremony: Ceremony, role: str) -> None:
    ceremony.follow(ceremony.start())
    ceremony.run("rotate", role)
    ceremony.clock.advance(60)
    ceremony.follow(ceremony.start())


@pytest.mark.parametrize("role", ["targets", "snapshot", "timestamp"])
def test_a_roles_key_is_rotated_by_two_signatures_from_elsewhere(ceremony: Ceremony, role: str) -> None:
    ceremony.follow(ceremony.start())
    before = dict(ceremony.marks)
    ceremony.run("rotate", role)
    prepared = ceremony.data / "keys" / "root-next.json"
    ceremony.run("install", prepared, expect=1)  # nobody has signed
    ceremony.run("sign", prepared, "--root", ceremony.data / "root.json", "--key", ceremony.offline / "root-1.key")
    ceremony.run("install", prepared, expect=1)  # one of two
    ceremony.run("sign", prepared, "--root", ceremony.data / "root.json", "--key", ceremony.offline / "root-3.key")
    ceremony.run("install", prepared)
    ceremony.clock.advance(60)
    told = ceremony.follow(ceremony.start())
    assert told.marks["root"].version == 2
    assert told.marks[role].keys != before[role].keys


def test_a_lost_root_key_is_replaced_by_the_other_two(ceremony: Ceremony) -> None:
    ceremony.follow(ceremony.start())
    folder = ceremony.data / "keys"
    for name in ("root-1", "root-2", "root-3"):  # brought here for the ceremony
        shutil.copy(ceremony.offline / f"{name}.key", folder / f"{name}.key")
    ceremony.run("rotate", "root-2")
    assert json.loads((ceremony.data / "root.json").read_bytes())["signed"]["version"] == 2
    ceremony.clock.advance(60)
    ceremony.follow(ceremony.start())


def test_a_root_is_renewed_with_the_same_keys(ceremony: Ceremony) -> None:
    ceremony.follow(ceremony.start())
    for name in ("root-1", "root-2"):
        shutil.copy(ceremony.offline / f"{name}.key", ceremony.data / "keys" / f"{name}.key")
    ceremony.run("renew-root")
    repository = ceremony.start()
    assert ceremony.follow(repository).marks["root"].version == 2
    assert "move them offline" in repository.problems()[0]


def test_a_stranger_cannot_sign_a_root(ceremony: Ceremony) -> None:
    ceremony.start()
    ceremony.run("rotate", "snapshot")
    prepared = ceremony.data / "keys" / "root-next.json"
    key = ceremony.data / "keys" / "targets.key"
    ceremony.run("sign", prepared, "--root", ceremony.data / "root.json", "--key", key, expect=1)


def test_an_envelope_key_is_withdrawn_once_another_one_signs(ceremony: Ceremony) -> None:
    ceremony.start()
    old = open_keys(ceremony.data).documents.kid
    ceremony.run("revoke", old, expect=1)
    ceremony.run("rotate", "documents")
    assert open_keys(ceremony.data).keyring().find(old) is not None
    ceremony.run("revoke", old)
    ring = decode_keyring((ceremony.data / "keys" / "documents.json").read_bytes())
    assert [key.kid for key in ring.keys] == [open_keys(ceremony.data).documents.kid] != [old]
    ceremony.follow(ceremony.start())


def test_status_says_what_is_here_and_what_to_do(ceremony: Ceremony, capsys: pytest.CaptureFixture[str]) -> None:
    ceremony.start()
    capsys.readouterr()
    ceremony.run("status", "--json")
    status = json.loads(capsys.readouterr().out)
    roles = {entry["role"]: entry for entry in status["roles"]}
    assert (roles["root"]["needed"], len(roles["root"]["keys"]), roles["root"]["here"]) == (2, 3, [])
    assert roles["timestamp"]["here"] == ["timestamp.key"]
    assert status["documents"][0][0] == open_keys(ceremony.data).documents.kid


def test_a_role_key_that_was_lost_is_not_made_anew_in_silence(ceremony: Ceremony) -> None:
    ceremony.start()
    (ceremony.data / "keys" / "documents.key").unlink()
    with pytest.raises(Malformed, match=r"documents\.key is missing"):
        open_keys(ceremony.data)


def test_a_repository_that_was_lost_is_not_replaced_by_another_that_no_node_believes(ceremony: Ceremony) -> None:
    ceremony.start()
    root = (ceremony.data / "root.json").read_bytes()
    shutil.rmtree(ceremony.data / "tuf")
    with pytest.raises(Malformed, match="restore it from a backup"):
        ceremony.start()
    for command in ("init", "status", "renew-root", "reissue"):
        ceremony.run(command, expect=1)
    assert (ceremony.data / "root.json").read_bytes() == root
    assert not list((ceremony.data / "keys").glob("root-*.key"))
