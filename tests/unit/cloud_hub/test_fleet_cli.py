"""`tierline hub settings` and `tierline hub deployments`: what they send, what they say, and one line for every mistake."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from cloud_hub import command as hub_command
from cloud_hub import fleet_cli
from cloud_hub.cli import hub
from cloud_hub.client import HubError

DEPLOYMENT = {
    "name": "edges",
    "tenant": "acme",
    "selector": {"tier": "edge", "line": "2"},
    "models": {"digits": "digits-cnn/1"},
    "progress": {"total": 3, "in_sync": 2, "pending": 0, "applying": 0, "refused": 1, "stale": 0},
}


class Answers:
    """Stands in for `HubClient`: remembers what was asked, answers what the test says."""

    asked: list[tuple[str, str, bytes]]
    answer: Any

    def __init__(self, *_: object) -> None:
        pass

    def get(self, path: str) -> Any:
        return self.send("GET", path, b"")

    def send(self, method: str, path: str, body: bytes) -> Any:
        self.asked.append((method, path, body))
        if isinstance(self.answer, Exception):
            raise self.answer
        return self.answer

    def close(self) -> None:
        pass


@pytest.fixture
def answers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> type[Answers]:
    (tmp_path / "token").write_text("tla_x")
    monkeypatch.setenv("TIERLINE_TOKEN_FILE", str(tmp_path / "token"))
    monkeypatch.setattr(hub_command, "HubClient", Answers)
    Answers.asked, Answers.answer = [], None
    return Answers


@pytest.mark.parametrize("command", fleet_cli.FLEET_COMMANDS)
def test_they_explain_themselves_and_take_hub_and_token(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        hub([command, "--help"])
    assert stop.value.code == 0
    shown = capsys.readouterr().out
    assert all(option in shown for option in ("--hub", "--token-file", "--hub-ca", f"tierline hub {command}"))


@pytest.mark.parametrize(("of", "path"), [("acme", "acme"), ("acme.edge-1", "nodes/acme.edge-1")])
def test_a_name_with_a_dot_is_a_node(of: str, path: str, answers, tmp_path: Path) -> None:
    (tmp_path / "settings.json").write_bytes(b'{"force": 1}')
    answers.answer = {"revision": 4, "settings": {}}
    for arguments in (["show", of], ["set", of, str(tmp_path / "settings.json")], ["remove", of]):
        assert hub(["settings", *arguments]) == 0
    whole = f"/api/v1/settings/{path}"
    assert answers.asked == [("GET", whole, b""), ("PUT", whole, b'{"force": 1}'), ("DELETE", whole, b"")]


def test_what_is_shown_can_be_set_again(answers, capsys: pytest.CaptureFixture[str]) -> None:
    answers.answer = {"revision": 1, "settings": {"force": 1, "of": "tenant"}}
    assert hub(["settings", "show", "acme.edge-1"]) == 0
    shown = capsys.readouterr()
    assert shown.out == '{\n  "force": 1\n}\n'
    assert "its tenant's apply" in shown.err
    assert hub(["settings", "show", "acme"]) == 0
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    ("of", "left", "said"),
    [
        ("acme.edge-1", {"force": 1, "of": "tenant"}, "acme.edge-1 goes by the settings of its tenant (revision 3)"),
        ("acme.edge-1", {"of": "none"}, "acme.edge-1 goes by its own configuration (revision 3)"),
        ("acme", {"of": "none"}, "acme has no settings: the nodes' own apply (revision 3)"),
    ],
)
def test_removing_says_what_applies_then(of: str, left: dict, said: str, answers, capsys) -> None:
    answers.answer = {"revision": 3, "settings": left}
    assert hub(["settings", "remove", of]) == 0
    assert capsys.readouterr().out == f"{said}\n"


def test_deployments_are_listed_by_themselves(answers, capsys: pytest.CaptureFixture[str]) -> None:
    answers.answer = {"items": [DEPLOYMENT]}
    assert hub(["deployments"]) == hub(["deployments", "list"]) == 0
    heads, row, *_ = capsys.readouterr().out.splitlines()
    assert heads.split() == ["DEPLOYMENT", "TENANT", "SELECTOR", "MODELS", "NODES", "IN", "SYNC", "REFUSED"]
    assert row.split() == ["edges", "acme", "line=2", "tier=edge", "digits=digits-cnn/1", "3", "2", "1"]


def test_a_deployment_is_removed_by_its_name(answers, capsys: pytest.CaptureFixture[str]) -> None:
    assert hub(["deployments", "remove", "a/b"]) == 0
    assert answers.asked == [("DELETE", "/api/v1/deployments/a%2Fb", b"")]
    assert "is gone" in capsys.readouterr().out


@pytest.mark.parametrize("arguments", [["settings", "remove", "acme"], ["deployments", "remove", "ghost"]])
def test_a_refusal_of_the_hub_is_one_line_and_exit_1(arguments: list[str], answers, capsys) -> None:
    answers.answer = HubError("no deployment 'ghost'")
    assert hub(arguments) == 1
    assert capsys.readouterr().err == f"tierline hub {arguments[0]}: no deployment 'ghost'\n"


def test_a_file_that_is_not_there_is_one_line_and_exit_2(answers, tmp_path: Path, capsys) -> None:
    assert hub(["settings", "set", "acme", str(tmp_path / "absent")]) == 2
    assert capsys.readouterr().err.count("\n") == 1
    assert answers.asked == []


@pytest.mark.parametrize(
    "arguments",
    [
        ["settings"],
        ["settings", "show"],
        ["settings", "set", "acme"],
        ["settings", "remove", "acme", "file"],
        ["settings", "burn", "acme"],
        ["deployments", "remove"],
        ["deployments", "list", "edges"],
    ],
)
def test_wrong_usage_is_exit_2(arguments: list[str], answers) -> None:
    with pytest.raises(SystemExit) as stop:
        hub(arguments)
    assert stop.value.code == 2
    assert answers.asked == []


def test_a_command_mistyped_is_named_with_its_neighbour(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        hub(["setings", "show", "demo"])
    assert "no command 'setings'; did you mean 'settings'?" in capsys.readouterr().err
