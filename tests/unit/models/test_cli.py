"""`tierline serve` refuses in one line what it cannot do."""

from __future__ import annotations

import socket
from pathlib import Path
from typing import Any

import pytest

from models.cli import serve


def test_a_reachable_address_needs_a_word_of_consent(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert serve([str(tmp_path), "--host", "0.0.0.0"]) == 2
    error = capsys.readouterr().err
    assert "--insecure" in error
    assert error.count("\n") == 1


def test_metrics_for_other_machines_need_a_word_of_consent_of_their_own(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["--host", "0.0.0.0", "--access", "a", "--tls-cert", "c", "--tls-key", "k", "--metrics-port", "0"]
    assert serve([str(tmp_path), *options, "--metrics-host", "0.0.0.0"]) == 2
    error = capsys.readouterr().err
    assert "--metrics-host 0.0.0.0" in error
    assert "--insecure" in error
    assert error.count("\n") == 1
    for accepted in ([], ["--metrics-host", "0.0.0.0", "--insecure"]):
        assert serve([str(tmp_path / "missing"), *options, *accepted]) == 2
        assert "--metrics-host" not in capsys.readouterr().err


@pytest.mark.parametrize("name", ["missing", ""])
def test_a_folder_without_models_is_refused(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert serve([str(tmp_path / name)]) == 2
    assert str(tmp_path / name) in capsys.readouterr().err


def test_a_taken_port_is_refused(tmp_path: Path, onnx_model: Any, capsys: pytest.CaptureFixture[str]) -> None:
    folder = onnx_model("scale", path=tmp_path / "models" / "m" / "1" / "model.onnx").parents[2]
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        assert serve([str(folder), "--http-port", str(port)]) == 2
    assert f"port {port}" in capsys.readouterr().err


@pytest.mark.parametrize("port", ["-1", "65536", "http"])
def test_a_port_that_is_none_is_refused(port: str, tmp_path: Path) -> None:
    with pytest.raises(SystemExit) as caught:
        serve([str(tmp_path), "--http-port", port])
    assert caught.value.code == 2
