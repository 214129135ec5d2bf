"""A broker that follows the hub keeps out who was revoked, whatever else goes wrong."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from deploy import follow
from deploy.broker import Broker, Secure
from deploy.follow import Follower
from deploy.processes import DeployError


class Api:
    """A hub that knows whom to refuse and issues nothing."""

    def __init__(self, *arguments: object) -> None:
        """Nothing is opened."""

    def close(self) -> None:
        """Nothing is open."""

    def call(self, method: str, path: str, body: object = None) -> dict[str, Any]:
        if path.startswith("/api/v1/broker/access"):
            return {"bundle": "b", "passwords": "p", "acl": "a", "revocations": "r", "version": "2"}
        raise DeployError("the hub answered 500")


def test_revocations_do_not_wait_for_a_certificate(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(follow, "HubApi", Api)
    (tmp_path / "token").write_text("t")
    broker = Broker(tmp_path / "broker", secure=Secure(("127.0.0.1",)))
    assert not Follower(broker, "https://hub", tmp_path / "token").turn()
    assert (tmp_path / "broker" / "revoked.pem").read_text() == "r"
    assert (tmp_path / "broker" / "acl").read_text() == "a"


def test_a_hub_that_never_started_is_waited_for_in_words(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert not Follower(Broker(tmp_path / "broker"), "http://127.0.0.1:9", tmp_path / "admin.token").turn()
    assert capsys.readouterr().out == f"waiting for the hub: {tmp_path / 'admin.token'} is not there yet\n"


@pytest.mark.parametrize("content", [b"", b"nonsense"])
def test_a_damaged_key_is_made_anew(tmp_path: Path, content: bytes) -> None:
    broker = Broker(tmp_path, secure=Secure(("127.0.0.1",)))
    first = (broker.request(), (tmp_path / "server.key").read_bytes())
    assert (tmp_path / "server.key").read_bytes() == first[1], "and a good one is kept"
    (tmp_path / "server.key").write_bytes(content)
    assert broker.request() != first[0]
    assert (tmp_path / "server.key").stat().st_mode & 0o777 == 0o600
