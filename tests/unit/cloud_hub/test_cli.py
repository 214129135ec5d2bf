"""The commands: one line for every mistake, never a traceback."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from hub_in_memory import make_manifest

from cloud_hub.cli import COMMANDS, main
from cloud_hub.client import find_files
from cloud_hub.server import check_loopback
from models.errors import InvalidManifest
from models.manifest import encode_manifest
from sync.errors import InvalidConfig


@pytest.fixture
def token_file(tmp_path: Path) -> str:
    (tmp_path / "token").write_text("tla_x")
    return str(tmp_path / "token")


@pytest.mark.parametrize("command", [name for name in COMMANDS if name != "hub"])
def test_every_command_explains_itself_and_takes_hub_and_token(
    command: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stop:
        main(command, ["--help"])
    assert stop.value.code == 0
    shown = capsys.readouterr().out
    assert "--hub" in shown
    assert "--token-file" in shown


ARGUMENTS: dict[str, list[str]] = {
    "publish": ["."],
    "packages": [],
    "deploy": ["d", "--model", "a=b/1"],
    "nodes": [],
    "node-add": ["a.b", "--tier", "edge"],
}


@pytest.mark.parametrize("command", ARGUMENTS)
def test_a_hub_that_is_not_there_is_one_line_and_exit_1(
    command: str, token_file: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = [str(make_folder(tmp_path))] if command == "publish" else ARGUMENTS[command]
    # Port 9 (discard) of loopback: nobody listens there.
    assert main(command, [*arguments, "--hub", "http://127.0.0.1:9", "--token-file", token_file]) == 1
    error = capsys.readouterr().err
    assert error.startswith(f"tierline {command}: no answer from http://127.0.0.1:9")
    assert error.count("\n") == 1


def test_a_missing_token_is_said_before_anything_is_sent(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("TIERLINE_TOKEN_FILE", raising=False)
    assert main("nodes", []) == 2
    assert "TIERLINE_TOKEN_FILE" in capsys.readouterr().err
    assert main("nodes", ["--token-file", "/nonexistent"]) == 2


@pytest.mark.parametrize(
    "arguments", [["d", "--model", "digits"], ["d", "--model", "a=b/1", "--select", "tier"], ["d"], []]
)
def test_wrong_usage_is_exit_2(arguments: list[str], token_file: str) -> None:
    with pytest.raises(SystemExit) as stop:
        main("deploy", [*arguments, "--token-file", token_file])
    assert stop.value.code == 2


def make_folder(root: Path) -> Path:
    folder = root / "package"
    folder.mkdir()
    (folder / "golden.npz").write_bytes(b"golden")
    (folder / "m.onnx").write_bytes(b"model")
    manifest = make_manifest("digits-cnn", "1", b"golden", b"model")
    (folder / "manifest.json").write_bytes(encode_manifest(manifest))
    return folder


def no_manifest(folder: Path) -> None:
    (folder / "manifest.json").unlink()


def broken_manifest(folder: Path) -> None:
    (folder / "manifest.json").write_bytes(b"{")


def missing_file(folder: Path) -> None:
    (folder / "m.onnx").unlink()


def tampered_file(folder: Path) -> None:
    (folder / "m.onnx").write_bytes(b"MODEL")


@pytest.mark.parametrize("spoil", [no_manifest, broken_manifest, missing_file, tampered_file])
def test_a_folder_that_is_no_package_is_one_line_and_exit_2(
    spoil: Callable[[Path], None], token_file: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = make_folder(tmp_path)
    spoil(folder)
    assert main("publish", [str(folder), "--hub", "http://127.0.0.1:9", "--token-file", token_file]) == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_files_are_found_by_content_whatever_they_are_called(tmp_path: Path) -> None:
    folder = make_folder(tmp_path)
    (folder / "m.onnx").rename(folder / "renamed")
    (folder / "noise").write_bytes(b"MODEL")
    manifest = make_manifest("digits-cnn", "1", b"golden", b"model")
    assert find_files(folder, manifest)[manifest.variants[0].blob.digest].name == "renamed"
    with pytest.raises(InvalidManifest, match="variant onnx fp32: no file here has the content"):
        find_files(tmp_path, manifest)


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.168.1.2", "hub.example.org", ""])
def test_nothing_binds_or_dials_beyond_this_machine(host: str) -> None:
    with pytest.raises(InvalidConfig, match="host"):
        check_loopback("host", host)


@pytest.mark.parametrize("host", ["127.0.0.1", "::1", "localhost"])
def test_loopback_is_accepted(host: str) -> None:
    check_loopback("host", host)


@pytest.mark.parametrize(
    "options",
    [["--broker", "mqtt://broker.example.org"], ["--broker", "ws://10.0.0.1"], ["--broker", "http://127.0.0.1"]],
)
def test_a_hub_that_would_reach_beyond_loopback_does_not_start(
    options: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("models.serving.process.configure_logging", lambda node: None)  # pytest owns the log here
    assert main("hub", ["--data", str(tmp_path / "hub"), "--http-port", "0", *options]) == 2
    assert capsys.readouterr().err.splitlines()[-1].startswith("tierline hub: ")
    assert not (tmp_path / "hub").exists()
