"""Golden inputs asked of a document's models: right, wrong, damaged, missing."""

from __future__ import annotations

from hashlib import sha256
from pathlib import Path

import pytest

from models import doctor
from models.desired import Desired, assignment_of, encode_desired
from models.manifest import Blob, decode_manifest
from models.zoo import digits


@pytest.fixture
def stored(tmp_path: Path) -> tuple[bytes, dict[str, Path]]:
    """A desired body for a real small package, and its files by digest."""
    folder = digits.package_folder("device", "1")
    files = {}
    for path in folder.iterdir():
        content = path.read_bytes()
        name = f"sha256:{sha256(content).hexdigest()}"
        files[name] = tmp_path / name.removeprefix("sha256:")
        files[name].write_bytes(content)
    content = (folder / "manifest.json").read_bytes()
    blob = Blob(f"sha256:{sha256(content).hexdigest()}", len(content))
    return encode_desired(Desired({"digits": assignment_of(decode_manifest(content), blob)})), files


def test_models_that_answer_their_golden_inputs_are_told_with_their_time(stored: tuple[bytes, dict[str, Path]]) -> None:
    body, files = stored
    status, found, _ = doctor.run_here(body, files.__getitem__)
    assert status == "ok", found
    assert found.startswith("digits (")
    assert found.endswith(" ms")


def test_a_damaged_model_is_named(stored: tuple[bytes, dict[str, Path]]) -> None:
    body, files = stored
    case = next(doctor.cases(body, files.__getitem__))
    case.file.write_bytes(b"no model")
    status, found, _ = doctor.run_here(body, files.__getitem__)
    assert status == "fail"
    assert "digits" in found


def test_a_file_that_is_not_there_is_a_failure_and_no_exception(stored: tuple[bytes, dict[str, Path]]) -> None:
    body, files = stored
    next(doctor.cases(body, files.__getitem__)).file.unlink()
    assert doctor.run_here(body, files.__getitem__)[0] == "fail"


def test_a_data_plane_that_is_away_is_a_failure(stored: tuple[bytes, dict[str, Path]]) -> None:
    body, files = stored
    status, found, _ = doctor.run_there("http://127.0.0.1:1", body, files.__getitem__, "edge")
    assert status == "fail"
    assert "digits" in found


def test_engines_are_told_with_their_versions() -> None:
    status, found, _ = doctor.engines(load=False)
    assert status == "ok"
    assert "onnx" in found
