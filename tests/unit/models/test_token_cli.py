"""`tierline token` from making a key to a server that takes what was issued."""

from __future__ import annotations

import io
from pathlib import Path

import pytest
from access_writer import AccessWriter

from models.serving.access.checked import CheckedAccess
from models.serving.caller import LOCAL_PEER
from models.token_cli import token


@pytest.fixture
def key(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Path:
    assert token(["new-key", str(tmp_path / "keys")]) == 0
    shown = capsys.readouterr().out
    (private,) = (tmp_path / "keys").glob("*.key")
    assert str(private) in shown
    assert private.stat().st_mode & 0o777 == 0o600
    (tmp_path / "access.toml").write_text('keys = "keys"\n[tenants.acme]\n')
    return private


def issued(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    assert token(["issue", *arguments]) == 0
    return capsys.readouterr().out.strip()


def test_a_token_that_was_issued_is_taken_by_a_server_with_that_key(
    key: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert (
        token(["issue", "--key", str(key), "--client", "c", "--tenant", "acme", "--models", "a*", "--models", "b"]) == 0
    )
    shown = capsys.readouterr()
    assert shown.out.count("\n") == 1, "nothing but the token, so that a script can catch it"
    assert "8 h from now" in shown.err
    caller = CheckedAccess(tmp_path / "access.toml").identify(LOCAL_PEER, b"Bearer " + shown.out.strip().encode())
    assert (caller.client, caller.tenant, caller.models, caller.admin) == ("c", "acme", ("a*", "b"), False)


def test_showing_says_what_a_token_holds_and_whether_a_server_takes_it(
    key: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    good = issued(capsys, "--key", str(key), "--client", "pump", "--tenant", "acme", "--admin", "--hours", "0.5")
    assert token(["show", good]) == 0
    shown = capsys.readouterr().out
    for words in ("pump", "acme", "30 min from now", "admin      yes", "--access"):
        assert words in shown
    monkeypatch.setattr("sys.stdin", io.StringIO(f"Bearer {good}\n"))
    assert token(["show", "-", "--access", str(tmp_path / "access.toml")]) == 0
    assert "accepted" in capsys.readouterr().out
    ghost = issued(capsys, "--key", str(key), "--client", "c", "--tenant", "ghost")
    assert token(["show", ghost, "--access", str(tmp_path / "access.toml")]) == 1
    assert "wrong      the token's tenant is not known here" in capsys.readouterr().out


def test_everything_that_is_wrong_is_said_at_once_and_harmless_to_a_terminal(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    writer = AccessWriter(tmp_path)
    assert token(["show", writer.token(aud="x\x1b[31m", iat=1000, exp=2000, models=["\x1b]0;a"])]) == 1
    shown = capsys.readouterr().out
    assert "not for the audience 'tierline'" in shown
    assert "expired" in shown
    assert "\x1b" not in shown
    assert token(["show", writer.token(exp=None)]) == 1
    assert "`exp`" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["show", "abc"], "not a token"),
        (["show", "abc", "--access", "absent.toml"], "absent.toml: No such file"),
        (["issue", "--key", "absent.key", "--client", "c"], "absent.key: No such file"),
        (["issue", "--key", "{key}", "--client", ""], "sub"),
    ],
)
def test_a_mistake_is_answered_in_one_line(
    key: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], words: str
) -> None:
    assert token([each.replace("{key}", str(key)) for each in arguments]) == 2
    error = capsys.readouterr().err
    assert error.startswith("tierline token: ")
    assert words in error
    assert error.count("\n") == 1


@pytest.mark.parametrize("hours", ["0", "-1", "745", "nan", "inf", "x"])
def test_a_time_no_server_accepts_is_refused(key: Path, hours: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        token(["issue", "--key", str(key), "--client", "c", f"--hours={hours}"])
    assert "744 hours" in capsys.readouterr().err
