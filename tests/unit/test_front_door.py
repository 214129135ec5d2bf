from __future__ import annotations

from importlib import import_module

import pytest

import tierline


@pytest.mark.parametrize("command", tierline.COMMANDS)
def test_every_command_of_the_table_exists_and_explains_itself(
    command: str, capsys: pytest.CaptureFixture[str]
) -> None:
    module, _, attribute = tierline.COMMANDS[command][0].partition(":")
    assert callable(getattr(import_module(module), attribute))
    with pytest.raises(SystemExit) as stop:
        tierline.main([command, "--help"])
    assert stop.value.code == 0
    assert f"tierline {command}" in capsys.readouterr().out


def test_a_typo_is_answered_with_the_nearest_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert tierline.main(["serv"]) == 2
    assert "did you mean 'serve'?" in capsys.readouterr().err


def test_no_command_shows_what_there_is(capsys: pytest.CaptureFixture[str]) -> None:
    assert tierline.main([]) == 0
    shown = capsys.readouterr().out
    assert all(command in shown for command in tierline.COMMANDS)


def test_a_missing_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(tierline.COMMANDS, "ghost", ("not_installed_anywhere.cli:run", "hub", "nothing"))
    with pytest.raises(SystemExit, match=r"needs 'not_installed_anywhere': pip install 'tierline\[hub\]'"):
        tierline.main(["ghost"])
