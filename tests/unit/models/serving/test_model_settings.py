from __future__ import annotations

from pathlib import Path

import pytest

from models.errors import PackageError
from models.serving.model_settings import MAX_SETTINGS_BYTES, ModelSettings, read_settings
from models.serving.version_policy import Latest, Specific


def test_without_a_file_all_defaults_hold(tmp_path: Path) -> None:
    assert read_settings(tmp_path / "model.toml") == ModelSettings()


def test_every_setting_is_read(tmp_path: Path) -> None:
    path = tmp_path / "model.toml"
    path.write_text(
        'version_policy = { latest = 2 }\nbatching = 16\ncache = true\nisolation = "process"\npreload = false\n'
        "warmup = false\nmemory_mb = 120\nmax_run_seconds = 2.5\nthreads = 2\n"
    )
    assert read_settings(path) == ModelSettings(
        version_policy=Latest(2),
        batching=16,
        cache=True,
        isolation="process",
        preload=False,
        warmup=False,
        memory_mb=120.0,
        max_run_seconds=2.5,
        threads=2,
    )
    path.write_text('version_policy = { specific = [1, 3] }\nbatching = "off"\n')
    assert read_settings(path) == ModelSettings(version_policy=Specific((1, 3)), batching="off")


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("batchin = 3", "batchin"),
        ('batching = "on"', "batching"),
        ("batching = 0", "batching"),
        ("batching = 4097", "batching"),
        ("batching = true", "batching"),
        ("cache = 1", "cache"),
        ('isolation = "vm"', "isolation"),
        ("memory_mb = 0", "memory_mb"),
        ("memory_mb = nan", "memory_mb"),
        ("max_run_seconds = -1", "max_run_seconds"),
        ("threads = 0", "threads"),
        ('version_policy = "newest"', "version_policy"),
        ("version_policy = { newest = 1 }", "version_policy"),
        ("version_policy = { latest = 0 }", "version_policy"),
        ("version_policy = {}", "version_policy"),
        ("batching =", "end of document"),
        ("\N{LATIN SMALL LETTER E WITH ACUTE}", "Invalid"),
        ("a = " + "[" * 5000, "Invalid|recursion|nest"),
        ("#" * (MAX_SETTINGS_BYTES + 1), "more than"),
    ],
)
def test_a_wrong_setting_is_refused_by_file_and_field(tmp_path: Path, text: str, named: str) -> None:
    path = tmp_path / "m" / "model.toml"
    path.parent.mkdir()
    path.write_text(text)
    with pytest.raises(PackageError, match=rf"^m/model\.toml: .*({named})"):
        read_settings(path)


def test_a_file_that_is_no_text_or_no_file_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "m" / "model.toml"
    path.mkdir(parents=True)
    with pytest.raises(PackageError, match=r"m/model\.toml: Is a directory"):
        read_settings(path)
    path.rmdir()
    path.write_bytes(b"\xff")
    with pytest.raises(PackageError, match=r"m/model\.toml: .*utf-8"):
        read_settings(path)
