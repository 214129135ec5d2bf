"""Joining a hub: interrupted anywhere, it is finished by saying the same again."""

from __future__ import annotations

import io
import sys
import time
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import msgspec
import pytest
from cryptography import x509
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

from sync import credentials, enrol, enrol_cli
from sync.credentials import PENDING, new_key
from sync.enrol import join_hub, leave_hub
from sync.enrol_messages import Enrolled, Token
from sync.errors import InvalidConfig, StoreFailed, Unavailable
from sync.hub_call import HubRefused
from sync.identity import Membership, load_config

NODE = "acme.edge-1"
URL = "https://hub:8443"


def certificate(public: Any) -> str:
    """For this key, by somebody whom nobody asks about."""
    start, name = datetime.now(UTC), x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, NODE)])
    builder = x509.CertificateBuilder().subject_name(name).issuer_name(name).serial_number(1).public_key(public)
    builder = builder.not_valid_before(start).not_valid_after(start + timedelta(days=7))
    return builder.sign(new_key(), SHA256()).public_bytes(Encoding.PEM).decode()


class FakeHub:
    """One token, good for one key. `lose`: answers that do not arrive. `more`: of what it answers."""

    def __init__(self) -> None:
        self.root = certificate(new_key().public_key())
        self.lose = 0
        self.used: list[bytes] = []
        self.spent: list[bytes] = []
        self.more: dict[str, Any] = {}

    @property
    def token(self) -> str:
        return str(Token("x" * 43, x509.load_pem_x509_certificate(self.root.encode()).fingerprint(SHA256()).hex()))

    def call(self, url: str, body: Any, context: Any, proxy: str | None = None) -> bytes:
        if url.endswith("/ca"):
            return msgspec.json.encode({"bundle": self.root})
        public = x509.load_pem_x509_csr(body.csr.encode()).public_key()
        key = public.public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)
        if key in self.spent:
            raise HubRefused(409, "the key was enrolled before")
        if self.used and key not in self.used:
            raise HubRefused(401, "the token was used before")
        self.used.append(key)
        if self.lose:
            self.lose -= 1
            raise Unavailable("the answer was lost")
        made = certificate(public)
        fields = {"node": NODE, "tier": "edge", "certificate": made, "bundle": self.root, "time": time.time()}
        return msgspec.json.encode(Enrolled(**{**fields, "trust": b"{}", "trust_name": "root.json", **self.more}))


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> FakeHub:
    hub = FakeHub()
    monkeypatch.setattr(enrol, "call", hub.call)
    return hub


def membership(config: Path) -> Membership:
    return load_config(config, enrol_cli._Whole).node


def test_an_answer_that_is_lost_costs_no_token(hub: FakeHub, tmp_path: Path) -> None:
    hub.lose = 1
    with pytest.raises(Unavailable):
        join_hub(URL, hub.token, tmp_path / "n", tier="edge")
    joined = join_hub(URL, hub.token, tmp_path / "n", tier="edge")
    assert membership(joined.config).credentials()
    assert not (tmp_path / "n" / "identity" / PENDING).exists()
    with pytest.raises(InvalidConfig, match="there is a node already"):
        join_hub(URL, hub.token, tmp_path / "n", tier="edge")


@pytest.mark.parametrize("step", ["write_pair", "_config", "forget_pending_key"])
def test_a_power_cut_at_any_step_is_mended_by_joining_again(
    hub: FakeHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    def cut(*arguments: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(enrol, step, cut)
        with pytest.raises(KeyboardInterrupt):
            join_hub(URL, hub.token, tmp_path / "n", tier="edge")
    if step == "forget_pending_key":
        config = tmp_path / "n" / "node.toml"  # all of it was there
    else:
        config = join_hub(URL, hub.token, tmp_path / "n", tier="edge").config
    assert membership(config).credentials()


def test_a_machine_that_cannot_write_uses_no_token_up(
    hub: FakeHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*arguments: object, **more: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(credentials, "write_whole", full)
    with pytest.raises(StoreFailed):
        join_hub(URL, hub.token, tmp_path / "n", tier="edge")
    assert hub.used == []


def test_a_key_of_an_earlier_join_that_was_revoked_is_replaced(hub: FakeHub, tmp_path: Path) -> None:
    hub.lose = 1
    with pytest.raises(Unavailable):
        join_hub(URL, hub.token, tmp_path / "n", tier="edge")
    hub.spent, hub.used = hub.used, []
    assert join_hub(URL, hub.token, tmp_path / "n", tier="edge").node == NODE


def test_what_is_written_is_for_nobody_else_to_read(hub: FakeHub, tmp_path: Path) -> None:
    (tmp_path / "n").mkdir(mode=0o755)
    joined = join_hub(URL, hub.token, tmp_path / "n", tier="edge", proxy="http://user:geheim@proxy:3128")
    assert "geheim" in joined.config.read_text()
    assert joined.config.stat().st_mode & 0o077 == 0


@pytest.mark.parametrize("value", ["Halle 3 \U0001f3ed", "a\x7fb", "a\nb", 'q"\\', "Zürich"])
def test_any_label_that_the_hub_takes_can_be_read_back(hub: FakeHub, tmp_path: Path, value: str) -> None:
    hub.more = {"labels": {"site": value}}
    joined = join_hub(URL, hub.token, tmp_path / "n", tier="edge")
    assert membership(joined.config).labels == {"site": value}


def test_leaving_goes_the_way_that_renewing_goes(hub: FakeHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    proxies: list[str | None] = []

    class Told:
        def __init__(self, *arguments: object, proxy: str | None = None) -> None:
            proxies.append(proxy)

        def leave(self) -> None:
            return None

    monkeypatch.setattr(enrol, "Renewal", Told)
    joined = join_hub(URL, hub.token, tmp_path / "n", tier="edge", proxy="http://proxy:1")
    leave_hub(msgspec.structs.replace(membership(joined.config), direct=("hub",)))
    assert proxies == [None]


def said(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], token: str, *arguments: str) -> str:
    monkeypatch.setattr(sys, "stdin", io.StringIO(token))
    assert enrol_cli.identity("edge", ["join", URL, *arguments]) == 0
    return capsys.readouterr().err


@pytest.mark.parametrize("ahead", [-86_400, 86_400])
def test_a_clock_that_is_off_is_told_at_once(
    hub: FakeHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], ahead: float
) -> None:
    hub.more = {"time": time.time() - ahead}
    told = said(monkeypatch, capsys, hub.token, "--folder", str(tmp_path / "n"))
    assert "ahead of the hub's clock" in told if ahead > 0 else "behind the hub's clock" in told


def test_a_token_on_the_command_line_is_warned_of_and_elsewhere_is_not(
    hub: FakeHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "token"
    file.write_text(hub.token + "\n")
    assert "process list" in said(monkeypatch, capsys, "", "--folder", str(tmp_path / "1"), "--token", hub.token)
    hub.used = []
    assert said(monkeypatch, capsys, "", "--folder", str(tmp_path / "2"), "--token-file", str(file)) == ""
    hub.used = []
    assert said(monkeypatch, capsys, hub.token, "--folder", str(tmp_path / "3"), "--token", "-") == ""
    hub.used = []
    monkeypatch.setenv(enrol_cli.TOKEN_VARIABLE, hub.token)
    assert said(monkeypatch, capsys, "", "--folder", str(tmp_path / "4")) == ""
    hub.used = []
    proxy = ("--proxy", "http://u:geheim@p:1")
    told = said(monkeypatch, capsys, "", "--folder", str(tmp_path / "5"), *proxy)
    assert enrol_cli.PROXY_VARIABLE in told
    assert "geheim" not in told
