from __future__ import annotations

from pathlib import Path

import pytest
from msgspec.structs import replace
from package_writer import scale_package

from models.serving import verdicts
from models.serving.probe import Verdict
from models.serving.verdicts import Verdicts

BAD = Verdict(False, "differs")


def test_a_final_verdict_outlives_the_process(tmp_path: Path) -> None:
    manifest = scale_package(tmp_path, 2.0).manifest
    Verdicts(tmp_path / "kept").put(manifest, manifest.variants[0], BAD)
    assert Verdicts(tmp_path / "kept").get(manifest, manifest.variants[0]) == BAD


@pytest.mark.parametrize("field", ["blob", "golden", "tolerance", "engine"])
def test_a_verdict_is_for_one_file_under_one_promise(tmp_path: Path, field: str) -> None:
    manifest = scale_package(tmp_path, 2.0).manifest
    variant = manifest.variants[0]
    kept = Verdicts(tmp_path / "kept")
    kept.put(manifest, variant, BAD)
    other = scale_package(tmp_path / "other", 3.0).manifest
    if field == "golden":
        assert kept.get(replace(manifest, golden=other.golden), variant) is None
        return
    changed = {"blob": other.variants[0].blob, "tolerance": 0.5, "engine": "litert"}[field]
    assert kept.get(manifest, replace(variant, **{field: changed})) is None


def test_what_may_change_is_not_kept(tmp_path: Path) -> None:
    manifest = scale_package(tmp_path, 2.0).manifest
    kept = Verdicts(tmp_path / "kept")
    kept.put(manifest, manifest.variants[0], Verdict(False, "stopped", final=False))
    assert kept.get(manifest, manifest.variants[0]) is None


@pytest.mark.parametrize("damage", [b"", b'{"ok": tr', b'{"ok": "yes"}'])
def test_a_torn_verdict_counts_as_none(tmp_path: Path, damage: bytes) -> None:
    manifest = scale_package(tmp_path, 2.0).manifest
    kept = Verdicts(tmp_path / "kept")
    kept.put(manifest, manifest.variants[0], Verdict(True))
    next((tmp_path / "kept").iterdir()).write_bytes(damage)
    assert kept.get(manifest, manifest.variants[0]) is None


def test_the_folder_is_bounded_and_the_oldest_go_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(verdicts, "MAX_VERDICTS", 3)
    manifest = scale_package(tmp_path, 2.0).manifest
    variants = [replace(manifest.variants[0], tolerance=tolerance) for tolerance in (0.1, 0.2, 0.3, 0.4, 0.5)]
    kept = Verdicts(tmp_path / "kept")
    for variant in variants:
        kept.put(manifest, variant, BAD)
    assert [kept.get(manifest, variant) for variant in variants] == [None, None, BAD, BAD, BAD]


def test_a_disk_that_refuses_costs_nothing_but_the_verdict(tmp_path: Path) -> None:
    manifest = scale_package(tmp_path, 2.0).manifest
    (tmp_path / "file").write_text("")
    kept = Verdicts(tmp_path / "file" / "kept")
    kept.put(manifest, manifest.variants[0], BAD)
    assert kept.get(manifest, manifest.variants[0]) is None
