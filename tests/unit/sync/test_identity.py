"""A configuration that cannot work is refused by the name of the field."""

from __future__ import annotations

from pathlib import Path

import msgspec
import pytest

from sync.errors import InvalidConfig
from sync.identity import Membership, load_config
from sync.testing import ROOT


class Config(msgspec.Struct, forbid_unknown_fields=True):
    node: Membership
    threads: int = 1


GOOD = {
    "id": '"acme.edge-1"',
    "tier": '"edge"',
    "broker": '"mqtt://127.0.0.1:1883"',
    "sources": '["http://127.0.0.1:8080"]',
    "root": '"root.json"',
    "credential": '"node.token"',
    "data": '"data"',
}


def write(folder: Path, **changes: str | None) -> Path:
    lines = [f"{name} = {value}" for name, value in (GOOD | changes).items() if value is not None]
    path = folder / "edge.toml"
    path.write_text("[node]\n" + "\n".join(lines) + "\n")
    return path


def test_relative_paths_are_relative_to_the_file(tmp_path: Path) -> None:
    config = load_config(write(tmp_path, data='"/var/lib/x"'), Config)
    assert config.node.root == tmp_path / "root.json"
    assert config.node.data == Path("/var/lib/x")
    assert (config.node.tenant, config.threads) == ("acme", 1)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"id": '"edge"'}, "node id 'edge'"),
        ({"id": None}, "id"),
        ({"tier": '"fog"'}, "node.tier"),
        ({"broker": '"http://127.0.0.1"'}, "broker"),
        ({"broker": '"mqtt://10.0.0.1"'}, "node.broker"),
        ({"sources": '["ftp://127.0.0.1"]'}, r"node.sources\[0\]"),
        ({"sources": '["http://127.0.0.1:8080/"]'}, r"node.sources\[0\]"),
        ({"sources": '["http://127.0.0.1", "http://example.com"]'}, r"node.sources\[1\]"),
        ({"sources": '["http://127.0.0.1:x"]'}, r"node.sources\[0\]"),
        ({"groups": '["A B"]'}, "group"),
        ({"root": "3"}, "root"),
        ({"colour": '"red"'}, "colour"),
        ({"data": '"'}, "edge.toml"),
    ],
)
def test_a_bad_field_is_named(tmp_path: Path, changes: dict[str, str | None], says: str) -> None:
    with pytest.raises(InvalidConfig, match=says):
        load_config(write(tmp_path, **changes), Config)


def test_a_missing_or_binary_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(InvalidConfig, match=r"none\.toml"):
        load_config(tmp_path / "none.toml", Config)
    path = tmp_path / "edge.toml"
    path.write_bytes(b"\xff\xfe")
    with pytest.raises(InvalidConfig, match=r"edge\.toml"):
        load_config(path, Config)


def test_beyond_this_machine_only_when_it_is_said(tmp_path: Path) -> None:
    config = load_config(write(tmp_path, broker='"mqtt://10.0.0.1"', insecure="true"), Config)
    assert config.node.broker == "mqtt://10.0.0.1"


@pytest.mark.parametrize(("data", "mode"), [(b"", 0o600), (b"secret", 0o644), (b"\xff", 0o600), (b"a\nb", 0o600)])
def test_a_credential_that_is_empty_unreadable_or_open_to_others_is_refused(
    tmp_path: Path, data: bytes, mode: int
) -> None:
    node = load_config(write(tmp_path), Config).node
    with pytest.raises(InvalidConfig, match=r"node\.credential"):
        node.token()
    node.credential.write_bytes(data)
    node.credential.chmod(mode)
    with pytest.raises(InvalidConfig, match=r"node\.credential"):
        node.token()


def test_credential_and_root_are_read(tmp_path: Path) -> None:
    node = load_config(write(tmp_path), Config).node
    with pytest.raises(InvalidConfig, match=r"node\.root"):
        node.pinned()
    node.root.write_bytes(b"{")
    with pytest.raises(InvalidConfig, match=r"node\.root"):
        node.pinned()
    node.root.write_bytes(b'{"signed":{"_type":"targets"}}')
    with pytest.raises(InvalidConfig, match="'root' is expected"):
        node.pinned()
    node.root.write_bytes(ROOT)
    node.credential.write_bytes(b"secret\n")
    node.credential.chmod(0o600)
    assert node.pinned() == ROOT
    assert node.token() == "secret"
